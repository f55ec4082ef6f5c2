"""Plots of training and of many methods side by side, in the style of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from holdover.report.style import COLOURS, INK, colours_for, dress, finish, new_figure, save, tint


def plot_fronts(path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    """Draw speed against fidelity of many methods, panel by panel.

    Args:
        path: of the picture.
        panels: per panel and method ``(speed-up, PSNR in dB)`` of its settings, joined by a line. Dotted are those that
            no other setting of the panel beats in both.
    """
    figure = Figure(figsize=(6.4 * len(panels), 5.4), layout="constrained")
    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    styles = {name: (COLOURS[i % len(COLOURS)], "osD^v"[i // len(COLOURS) % 5]) for i, name in enumerate(names)}
    drawn = {}
    for axes, (title, methods) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in methods.items():
            colour, marker = styles[name]
            speeds, decibels = zip(*points, strict=True)
            style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 0.8}
            drawn[name] = axes.plot(speeds, decibels, label=name, **style)[0]
        best = unbeaten([point for points in methods.values() for point in points])
        axes.plot([p[0] for p in best], [p[1] for p in best], ":", color=INK, linewidth=1.4, zorder=1)
        axes.set_title(title, fontsize=9, color=INK)
        axes.set(xlabel="speed-up of the DiT", ylabel="PSNR against full compute, dB")
        dress(axes)
    figure.legend(
        handles=[drawn[name] for name in names],
        loc="outside lower center",
        ncols=4 * len(panels),
        frameon=False,
        labelcolor=INK,
        fontsize=8,
    )
    save(path, figure)


def unbeaten(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of ``(speed-up, PSNR)`` that no other equals or exceeds in both, by speed."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def plot_training(path: Path, log: Sequence[Mapping[str, Any]]) -> None:
    """Draw what `holdover_world.training.trainer.read_log` gives: the loss, and what held-out clips say."""
    figure, axes = new_figure(6.4, 3.2)
    steps = np.array([line["step"] for line in log])
    loss = np.array([line["loss"] for line in log], dtype=float)
    width = max(1, len(loss) // 100)
    axes.plot(steps, loss, color=COLOURS[0], alpha=0.2, linewidth=0.7)
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    lines = axes.plot(steps[width - 1 :], smooth, color=COLOURS[0], label="loss")
    axes.set(xlabel="step", ylabel="loss")
    if (loss > 0).all():
        axes.set_yscale("log")
    for key, (label, names) in _HELD_OUT.items():
        held = [(line["step"], *np.atleast_1d(line[key])) for line in log if key in line]
        if held:
            right = axes.twinx()
            at, *curves = np.array(held).T
            for name, values, style in zip(names, curves, ((COLOURS[1], "-"), (COLOURS[2], ":")), strict=False):
                lines += right.plot(at, values, color=style[0], linestyle=style[1], label=f"held out{name}")
            right.set_ylabel(label)
            tint(right)
    figure.legend(handles=lines, loc="outside upper center", ncols=3, frameon=False, labelcolor=INK, fontsize=8)
    finish(path, figure, axes, legend=False)


#: What a log says of held-out clips: the axis, and the curves; of a world model, and of an autoencoder.
_HELD_OUT = {
    "heldout": ("mean squared error of latents", (", one pass", ", sampled")),
    "heldout_psnr_db": ("PSNR, dB", ("",)),
}


def plot_returns(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], *, over: int) -> None:
    """Draw the returns of episodes against the environment steps at which they ended, each the mean of ``over``."""
    figure, axes = new_figure(6.4, 3.2)
    for colour, (name, episodes) in zip(colours_for(len(curves)), curves.items(), strict=True):
        steps, returns = np.array(episodes, float).reshape(-1, 2).T
        if len(steps) >= over:
            mean = np.convolve(returns, np.ones(over) / over, mode="valid")
            axes.plot(steps[over - 1 :], mean, color=colour, label=name)
    axes.set(xlabel="environment steps", ylabel=f"return, mean of {over} episodes")
    finish(path, figure, axes, legend=bool(axes.get_lines()))


def plot_pictures(path: Path, rows: Mapping[str, Mapping[str, NDArray[np.uint8]]]) -> None:
    """Draw pictures ``[H, W, 3]`` side by side, pixel by pixel: a row for each name, and in it a title for each."""
    columns = max(len(pictures) for pictures in rows.values())
    figure = Figure(figsize=(2.6 * columns, 2.1 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures) in zip(panels, rows.items(), strict=True):
        for axes, (title, picture) in zip(line, pictures.items(), strict=False):
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(f"{name}: {title}", fontsize=8, color=INK)
        for axes in line:
            axes.set_axis_off()
    save(path, figure)

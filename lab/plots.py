"""Plots of the lab's cards, in the style of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from holdover.report.style import COLOURS, INK, colours_for, dress, finish, new_figure, save


def plot_fronts(path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    """Draw the speed and the fidelity of many methods, panel by panel.

    Args:
        path: the picture to write.
        panels: for each panel and method the ``(speed-up, PSNR in dB)`` of its settings. A line joins them. A dotted
            line joins the settings that no other setting of the panel beats in both.
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
    """The points ``(speed-up, PSNR)`` that no other point equals or exceeds in both, sorted by speed-up."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def plot_returns(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], *, over: int) -> None:
    """Draw the mean return of ``over`` episodes against the environment step at which the last of them ended."""
    figure, axes = new_figure(6.4, 3.2)
    for colour, (name, episodes) in zip(colours_for(len(curves)), curves.items(), strict=True):
        steps, returns = np.array(episodes, float).reshape(-1, 2).T
        if len(steps) >= over:
            mean = np.convolve(returns, np.ones(over) / over, mode="valid")
            axes.plot(steps[over - 1 :], mean, color=colour, label=name)
    axes.set(xlabel="environment steps", ylabel=f"return, mean of {over} episodes")
    finish(path, figure, axes, legend=bool(axes.get_lines()))

"""Pictures of measurements. They have no background of their own, so that they suit light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from holdover.report.files import whole

INK = "#7d8590"
COLOURS = ("#2f81f7", "#e3742f", "#3fa34d", "#a371f7", "#c9445e", "#9a8c2c", "#1b9aaa", "#d16ba5")


def plot_block_skip(path: Path, curves: Mapping[str, NDArray[np.float64]]) -> None:
    """Draw the share of skipped calls per block; per run one value a block ``[blocks]``."""
    figure, axes = _figure(6.4, 3.0)
    for colour, (name, skip) in zip(_colours(len(curves)), curves.items(), strict=True):
        axes.plot(skip, "o-", color=colour, markersize=4, label=name)
    axes.set(xlabel="block", ylabel="skipped", ylim=(-0.03, 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(path, figure, axes, legend=bool(curves))


def plot_cosine_maps(path: Path, maps: Mapping[str, NDArray[np.float64]]) -> None:
    """Draw the cosines that a gate saw, one map ``[steps, blocks]`` per run; grey where it was never asked.

    Each map has its own scale: where the action's cosine is the least, it hides how little the blocks differ.
    """
    figure = Figure(figsize=(6.4, 0.6 + 1.5 * len(maps)), layout="constrained")
    panels = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    for axes, (name, cosines) in zip(panels, maps.items(), strict=True):
        axes.set_facecolor("#8888")
        known = cosines[np.isfinite(cosines)]
        low = min(float(known.min()), 0.999) if known.size else 0.0
        image = axes.imshow(cosines, vmin=low, vmax=1.0, cmap="viridis", aspect="auto")
        axes.set_title(name, fontsize=9, color=INK)
        axes.set(xlabel="block", ylabel="step")
        axes.set_yticks(range(cosines.shape[0]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tint(axes)
        bar = figure.colorbar(image, ax=axes, label="mean cosine")
        _tint(bar.ax)
    _save(path, figure)


def plot_psnr(path: Path, curves: Mapping[str, Mapping[str, NDArray[np.float64]]], *, fps: float) -> None:
    """Draw PSNR in dB of each frame ``[T]`` over time, per run one panel and per view of it one line.

    Frames of equal pictures (infinite or NaN) are left out; the last view is drawn in bold.
    """
    figure = Figure(figsize=(6.4, 0.8 + 2.2 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, views) in zip(panels, curves.items(), strict=True):
        for colour, (view, values) in zip(_colours(len(views)), views.items(), strict=True):
            last = view == list(views)[-1]
            decibels = np.where(np.isfinite(values), values, np.nan)
            style = {"color": INK, "linewidth": 1.8} if last else {"color": colour, "linewidth": 0.8}
            axes.plot(np.arange(len(values)) / fps, decibels, label=view, **style)
        axes.set_title(name, fontsize=9, color=INK)
        axes.set(ylabel="PSNR, dB")
        _dress(axes)
    panels[-1].set(xlabel="seconds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, labelcolor=INK, fontsize=8)
    _save(path, figure)


def plot_chunks(
    path: Path,
    curves: Mapping[str, NDArray[np.float64]],
    *,
    label: str,
    bounds: Mapping[str, NDArray[np.float64]] | None = None,
) -> None:
    """Draw a quantity per chunk ``[G]``, one line per run; dotted, the bound of the run of that name."""
    figure, axes = _figure(6.4, 3.0)
    for colour, (name, values) in zip(_colours(len(curves)), curves.items(), strict=True):
        axes.plot(values, color=colour, linewidth=1.2, label=name)
        if bounds and name in bounds:
            axes.plot(bounds[name], ":", color=colour, linewidth=1.2, label=f"{name}, bound")
    axes.set(xlabel="chunk", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(path, figure, axes, legend=bool(curves))


def plot_reactions(path: Path, curves: Mapping[str, Mapping[str, Sequence[float | None]]]) -> None:
    """Draw response ratios: per run and event one value for each chunk from the event on; 1 is right."""
    events = list(dict.fromkeys(event for by_event in curves.values() for event in by_event))
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    panels = figure.subplots(1, len(events), squeeze=False, sharey=True)[0]
    for axes, event in zip(panels, events, strict=True):
        axes.axhline(1.0, color=INK, linestyle=":", linewidth=1)
        for colour, (name, by_event) in zip(_colours(len(curves)), curves.items(), strict=True):
            ratios = [np.nan if ratio is None else ratio for ratio in by_event.get(event, ())]
            axes.plot(ratios, "o-", color=colour, markersize=5, label=name)
        axes.set_title(event.replace("_", " "), fontsize=9, color=INK)
        longest = max((len(by_event.get(event, ())) for by_event in curves.values()), default=1)
        axes.set(xlabel="chunks later", xlim=(-0.5, longest - 0.5), xticks=range(longest))
        _dress(axes)
    lowest, highest = panels[0].get_ylim()  # of all panels: they share it
    panels[0].set(ylabel="response ratio", ylim=(min(-0.1, lowest), max(1.3, highest)))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, labelcolor=INK, fontsize=8)
    _save(path, figure)


def plot_front(path: Path, points: Mapping[str, Sequence[tuple[str, float, float]]]) -> None:
    """Draw speed against fidelity: per run ``(scenario, speed-up, PSNR in dB)``, up and to the right is better."""
    figure, axes = _figure(6.4, 3.6)
    for colour, (name, found) in zip(_colours(len(points)), points.items(), strict=True):
        axes.plot([p[1] for p in found], [p[2] for p in found], "o", color=colour, markersize=6, label=name)
        for scenario, speedup, decibels in found:
            axes.annotate(
                scenario, (speedup, decibels), xytext=(5, 3), textcoords="offset points", fontsize=7, color=INK
            )
    axes.set(xlabel="speed-up", ylabel="PSNR against full compute, dB")
    axes.margins(0.15)
    _finish(path, figure, axes, legend=bool(points))


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
        _dress(axes)
    figure.legend(
        handles=[drawn[name] for name in names],
        loc="outside lower center",
        ncols=4 * len(panels),
        frameon=False,
        labelcolor=INK,
        fontsize=8,
    )
    _save(path, figure)


def unbeaten(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of ``(speed-up, PSNR)`` that no other equals or exceeds in both, by speed."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def plot_training(path: Path, log: Sequence[Mapping[str, Any]]) -> None:
    """Draw what `holdover_world.training.trainer.read_log` gives: the loss, and what held-out clips say."""
    figure, axes = _figure(6.4, 3.2)
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
            _tint(right)
    figure.legend(handles=lines, loc="outside upper center", ncols=3, frameon=False, labelcolor=INK, fontsize=8)
    _finish(path, figure, axes, legend=False)


#: What a log says of held-out clips: the axis, and the curves; of a world model, and of an autoencoder.
_HELD_OUT = {
    "heldout": ("mean squared error of latents", (", one pass", ", sampled")),
    "heldout_psnr_db": ("PSNR, dB", ("",)),
}


def plot_returns(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], *, over: int) -> None:
    """Draw the returns of episodes against the environment steps at which they ended, each the mean of ``over``."""
    figure, axes = _figure(6.4, 3.2)
    for colour, (name, episodes) in zip(_colours(len(curves)), curves.items(), strict=True):
        steps, returns = np.array(episodes, float).reshape(-1, 2).T
        if len(steps) >= over:
            mean = np.convolve(returns, np.ones(over) / over, mode="valid")
            axes.plot(steps[over - 1 :], mean, color=colour, label=name)
    axes.set(xlabel="environment steps", ylabel=f"return, mean of {over} episodes")
    _finish(path, figure, axes, legend=bool(axes.get_lines()))


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
    _save(path, figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _tint(axes: Axes) -> None:
    axes.tick_params(which="both", colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for spine in axes.spines.values():
        spine.set_color(INK)


def _dress(axes: Axes) -> None:
    _tint(axes)
    axes.grid(color=INK, alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_facecolor("none")


def _finish(path: Path, figure: Figure, axes: Axes, *, legend: bool) -> None:
    _dress(axes)
    if legend:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    _save(path, figure)


def _save(path: Path, figure: Figure) -> None:
    figure.patch.set_alpha(0.0)
    with whole(path) as partial:
        figure.savefig(partial, dpi=130)

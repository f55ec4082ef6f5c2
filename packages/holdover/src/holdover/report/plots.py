"""The plots of a run's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from holdover.report.style import INK, colours_for, dress, finish, new_figure, save, tint


def plot_block_skip(path: Path, curves: Mapping[str, NDArray[np.float64]]) -> None:
    """Draw the share of skipped calls per block ``[blocks]``, one line per run."""
    figure, axes = new_figure(6.4, 3.0)
    for colour, (name, skip) in zip(colours_for(len(curves)), curves.items(), strict=True):
        axes.plot(skip, "o-", color=colour, markersize=4, label=name)
    axes.set(xlabel="block", ylabel="skipped", ylim=(-0.03, 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(path, figure, axes, legend=bool(curves))


def plot_cosine_maps(path: Path, maps: Mapping[str, NDArray[np.float64]]) -> None:
    """Draw the cosines that a gate saw, one map ``[steps, blocks]`` per run; grey where it never decided.

    Each map has its own scale, because the cosine of the action can hide how little the blocks differ.
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
        tint(axes)
        bar = figure.colorbar(image, ax=axes, label="mean cosine")
        tint(bar.ax)
    save(path, figure)


def plot_psnr(path: Path, curves: Mapping[str, Mapping[str, NDArray[np.float64]]], *, fps: float) -> None:
    """Draw PSNR in dB of each frame ``[T]`` over time, per run one panel and per view of it one line.

    Frames of equal pictures (infinite or NaN) are left out; the last view is drawn in bold.
    """
    figure = Figure(figsize=(6.4, 0.8 + 2.2 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, views) in zip(panels, curves.items(), strict=True):
        for colour, (view, values) in zip(colours_for(len(views)), views.items(), strict=True):
            last = view == list(views)[-1]
            decibels = np.where(np.isfinite(values), values, np.nan)
            style = {"color": INK, "linewidth": 1.8} if last else {"color": colour, "linewidth": 0.8}
            axes.plot(np.arange(len(values)) / fps, decibels, label=view, **style)
        axes.set_title(name, fontsize=9, color=INK)
        axes.set(ylabel="PSNR, dB")
        dress(axes)
    panels[-1].set(xlabel="seconds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, labelcolor=INK, fontsize=8)
    save(path, figure)


def plot_chunks(
    path: Path,
    curves: Mapping[str, NDArray[np.float64]],
    *,
    label: str,
    bounds: Mapping[str, NDArray[np.float64]] | None = None,
) -> None:
    """Draw a quantity per chunk ``[G]``, one line per run; dotted, the bound of the run of that name."""
    figure, axes = new_figure(6.4, 3.0)
    for colour, (name, values) in zip(colours_for(len(curves)), curves.items(), strict=True):
        axes.plot(values, color=colour, linewidth=1.2, label=name)
        if bounds and name in bounds:
            axes.plot(bounds[name], ":", color=colour, linewidth=1.2, label=f"{name}, bound")
    axes.set(xlabel="chunk", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(path, figure, axes, legend=bool(curves))


def plot_reactions(path: Path, curves: Mapping[str, Mapping[str, Sequence[float | None]]]) -> None:
    """Draw response ratios, per run and event one value for each chunk from the event on. 1 is right."""
    events = list(dict.fromkeys(event for by_event in curves.values() for event in by_event))
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    panels = figure.subplots(1, len(events), squeeze=False, sharey=True)[0]
    for axes, event in zip(panels, events, strict=True):
        axes.axhline(1.0, color=INK, linestyle=":", linewidth=1)
        for colour, (name, by_event) in zip(colours_for(len(curves)), curves.items(), strict=True):
            ratios = [np.nan if ratio is None else ratio for ratio in by_event.get(event, ())]
            axes.plot(ratios, "o-", color=colour, markersize=5, label=name)
        axes.set_title(event.replace("_", " "), fontsize=9, color=INK)
        longest = max((len(by_event.get(event, ())) for by_event in curves.values()), default=1)
        axes.set(xlabel="chunks later", xlim=(-0.5, longest - 0.5), xticks=range(longest))
        dress(axes)
    lowest, highest = panels[0].get_ylim()  # of all panels: they share it
    panels[0].set(ylabel="response ratio", ylim=(min(-0.1, lowest), max(1.3, highest)))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, labelcolor=INK, fontsize=8)
    save(path, figure)


def plot_front(path: Path, points: Mapping[str, Sequence[tuple[str, float, float]]]) -> None:
    """Draw speed against fidelity, per run ``(scenario, speed-up, PSNR in dB)``. Up and to the right is better."""
    figure, axes = new_figure(6.4, 3.6)
    for colour, (name, found) in zip(colours_for(len(points)), points.items(), strict=True):
        axes.plot([p[1] for p in found], [p[2] for p in found], "o", color=colour, markersize=6, label=name)
        for scenario, speedup, decibels in found:
            axes.annotate(
                scenario, (speedup, decibels), xytext=(5, 3), textcoords="offset points", fontsize=7, color=INK
            )
    axes.set(xlabel="speed-up", ylabel="PSNR against full compute, dB")
    axes.margins(0.15)
    finish(path, figure, axes, legend=bool(points))

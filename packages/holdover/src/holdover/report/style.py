"""How every plot looks. Plots have no background of their own, so that they suit light and dark pages."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from holdover.report.files import whole

INK = "#7d8590"
COLOURS = ("#2f81f7", "#e3742f", "#3fa34d", "#a371f7", "#c9445e", "#9a8c2c", "#1b9aaa", "#d16ba5")


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def colours_for(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def tint(axes: Axes) -> None:
    axes.tick_params(which="both", colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for spine in axes.spines.values():
        spine.set_color(INK)


def dress(axes: Axes) -> None:
    tint(axes)
    axes.grid(color=INK, alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_facecolor("none")


def finish(path: Path, figure: Figure, axes: Axes, *, legend: bool) -> None:
    dress(axes)
    if legend:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    save(path, figure)


def save(path: Path, figure: Figure) -> None:
    figure.patch.set_alpha(0.0)
    with whole(path) as partial:
        figure.savefig(partial, dpi=130)

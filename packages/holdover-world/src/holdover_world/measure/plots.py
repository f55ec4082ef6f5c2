"""Plots of training and of evaluation, in the style of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from holdover.report.style import COLOURS, INK, finish, new_figure, save, tint


def plot_training(path: Path, log: Sequence[Mapping[str, Any]]) -> None:
    """Draw a training log (`holdover_world.training.trainer.read_log`): the loss, and the loss on held-out clips."""
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


#: The keys of held-out clips in a log, of a world model and of an autoencoder: label of the axis, names of the curves.
_HELD_OUT = {
    "heldout": ("mean squared error of latents", (", one pass", ", sampled")),
    "heldout_psnr_db": ("PSNR, dB", ("",)),
}


def plot_pictures(path: Path, rows: Mapping[str, Mapping[str, NDArray[np.uint8]]]) -> None:
    """Draw pictures ``[H, W, 3]`` side by side without smoothing: a row for each name, a title for each picture."""
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

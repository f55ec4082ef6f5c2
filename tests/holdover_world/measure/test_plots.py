"""The plot of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from holdover_world.measure.plots import plot_training


@pytest.mark.parametrize(
    ("held", "axis", "curves"),
    [
        (
            {50: {"heldout": [0.4, 0.5]}, 119: {"heldout": [0.1, 0.2]}},
            "mean squared error of latents",
            {"held out, one pass": [0.4, 0.1], "held out, sampled": [0.5, 0.2]},
        ),
        (
            {50: {"heldout_psnr_db": 21.5}, 119: {"heldout_psnr_db": 25.0}},
            "PSNR, dB",
            {"held out": [21.5, 25.0]},
        ),
    ],
)
def test_a_learning_curve_shows_the_values_of_held_out_clips(
    held: dict[int, dict[str, Any]],
    axis: str,
    curves: dict[str, list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    log = [{"step": i, "loss": 1 / (i + 1), **held.get(i, {})} for i in range(120)]
    plot_training(tmp_path / "curve.png", log)
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    left, right = figures[0].axes
    assert right.get_ylabel() == axis
    assert {str(line.get_label()): line.get_ydata().tolist() for line in right.get_lines()} == curves  # type: ignore[union-attr]
    assert all(np.array_equal(line.get_xdata(), [50, 119]) for line in right.get_lines())
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["loss", *curves]
    assert left.get_ylabel() == "loss"

"""The bound of a run: from decisions and times that are made up, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from holdover.decision import Decision
from holdover_world.measure.figures import cycle_bounds
from holdover_world.measure.timing import Shares, speedup


def test_the_bound_of_medians_is_no_bound_of_the_mean_skip() -> None:
    """Cycles of two chunks skip none, all and all of their calls."""
    made = [
        Decision(
            stream="a",
            branch="",
            chunk=chunk,
            index=0,
            slot=f"blocks.{block}",
            block=block,
            role="denoise",
            computed=chunk < 4,
            reason="cosine" if chunk < 4 else "reuse",
            scores={},
            sigma=None,
        )
        for chunk in range(2, 8)
        for block in range(2)
    ]
    bounds = cycle_bounds(Shares(blocks=0.8, passes=0.9), made, range(2, 8), 2)
    assert bounds == pytest.approx([1, 5, 5])
    full = np.array([1.0, 1.2, 1.4])
    assert speedup(full, full / bounds) == pytest.approx(
        float(np.median(bounds))
    )  # a run that loses nothing reaches it
    assert np.median(bounds) > 1 / (1 - 0.8 * 2 / 3)

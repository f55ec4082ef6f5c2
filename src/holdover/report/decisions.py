"""A cache's trace, condensed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from holdover.engine.trace import WARM_UP, Decision


def skip_by_block(decisions: Iterable[Decision], blocks: int) -> NDArray[np.float64]:
    """The share of each block's denoising calls after warm-up that was reused ``[blocks]``; NaN without calls."""
    calls, reused = np.zeros(blocks), np.zeros(blocks)
    for decision in decisions:
        if decision.role == "denoise" and decision.reason != WARM_UP:
            calls[decision.block] += 1
            reused[decision.block] += not decision.computed
    return _divide(reused, calls)


def cosine_by_step_and_block(decisions: Iterable[Decision], steps: int, blocks: int) -> NDArray[np.float64]:
    """The mean cosine that the gate saw ``[steps, blocks]``; NaN where a guard always decided before it."""
    total, count = np.zeros((steps, blocks)), np.zeros((steps, blocks))
    for decision in decisions:
        if "cosine" in decision.scores:
            total[decision.index, decision.block] += decision.scores["cosine"]
            count[decision.index, decision.block] += 1
    return _divide(total, count)


def _divide(total: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return ratio

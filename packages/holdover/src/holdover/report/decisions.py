"""The decisions of a cache, counted and arranged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdover.decision import WARM_UP, WINDOW, Decision

#: The category of a decision, for its colour. Reasons that `_OF_REASON` does not name are "computed".
REUSED, ANCHOR, PROTECTED, WARMING, COMPUTED = "reused", "anchor", "protected", "warm-up", "computed"
PARTLY, HELD = "part", "held"
CATEGORIES = (COMPUTED, REUSED, ANCHOR, PROTECTED, WARMING, PARTLY, HELD)
#: The letter of each category, where there is no colour.
LETTERS = {COMPUTED: "C", REUSED: "·", ANCHOR: "A", PROTECTED: "K", WARMING: "W", PARTLY: "P", HELD: "H"}
_OF_REASON = {
    "anchor": ANCHOR,
    "kv cycle": PROTECTED,
    "kv update": PROTECTED,
    "prefill": PROTECTED,
    WARM_UP: WARMING,
    "first": WARMING,
}
_PASS = {"kv_update": "KV update", "prefill": "prefill"}


def category(decision: Decision) -> str:
    """One of `CATEGORIES`."""
    if decision.computed:
        return _OF_REASON.get(decision.reason, COMPUTED)
    if decision.reason == WINDOW:
        return HELD
    return PARTLY if "recomputed" in decision.scores else REUSED


@dataclass(frozen=True, kw_only=True)
class Ribbon:
    """Decisions by chunk, pass and block.

    Attributes:
        passes: the names of the passes of a chunk, such as "step 0" or "KV update".
        blocks: the number of blocks.
        cells: per chunk, ``(pass, block) -> decision``.
    """

    passes: tuple[str, ...]
    blocks: int
    cells: Mapping[int, Mapping[tuple[int, int], Decision]]


def ribbon(decisions: Sequence[Decision]) -> Ribbon:
    """Arrange decisions by chunk, pass and block. Passes that do not denoise come last."""
    order = sorted({(d.role != "denoise", d.role, d.branch, d.index) for d in decisions})
    place = {key[1:]: row for row, key in enumerate(order)}
    cells: dict[int, dict[tuple[int, int], Decision]] = {}
    for d in decisions:
        cells.setdefault(d.chunk, {})[place[d.role, d.branch, d.index], d.block] = d
    return Ribbon(
        passes=tuple(
            " · ".join(filter(None, (branch, _PASS.get(role, f"step {index}")))) for _, role, branch, index in order
        ),
        blocks=max((d.block + 1 for d in decisions), default=0),
        cells=cells,
    )


def skip_rate(decisions: Iterable[Decision]) -> float | None:
    """The share of denoising block calls after warm-up that was reused; None if there is no such call."""
    counted = [d.computed for d in decisions if d.role == "denoise" and d.reason not in (WARM_UP, WINDOW)]
    return counted.count(False) / len(counted) if counted else None


def skip_by_block(decisions: Iterable[Decision], blocks: int) -> NDArray[np.float64]:
    """The share of each block's denoising calls after warm-up that was reused ``[blocks]``; NaN without calls."""
    calls, reused = np.zeros(blocks), np.zeros(blocks)
    for decision in decisions:
        if decision.role == "denoise" and decision.reason not in (WARM_UP, WINDOW):
            calls[decision.block] += 1
            reused[decision.block] += not decision.computed
    return _divide(reused, calls)


def cosine_by_step_and_block(decisions: Iterable[Decision], steps: int, blocks: int) -> NDArray[np.float64]:
    """The mean cosine that the gate saw ``[steps, blocks]``; NaN where a guard decided every time."""
    total, count = np.zeros((steps, blocks)), np.zeros((steps, blocks))
    for decision in decisions:
        if "cosine" in decision.scores:
            total[decision.index, decision.block] += decision.scores["cosine"]
            count[decision.index, decision.block] += 1
    return _divide(total, count)


def _divide(total: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return ratio

"""Δ-DiT's parts: the two halves of a model's blocks, and which of them is held over (arXiv 2406.01125)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from holdover.engine.contract import Call
from holdover.engine.slots import Span
from holdover.methods.parts.guards import Guard


@dataclass(frozen=True)
class Halves:
    """The front half of the blocks, rounded down, and the rear half."""

    def __call__(self, blocks: int) -> Sequence[Span]:
        if blocks < 2:
            raise ValueError(f"the model's {blocks} block has no halves; name two blocks or more as its slots")
        return [Span(0, blocks // 2 - 1), Span(blocks // 2, blocks - 1)]


@dataclass(frozen=True)
class OneHalf(Guard):
    """Computes the front half in a chunk's first steps, the rear half in the others.

    Attributes:
        early: the share of first steps, rounded down.
    """

    early: float

    def __post_init__(self) -> None:
        if not 0 <= self.early <= 1:
            raise ValueError(f"early={self.early} is not a share of the steps; give 0.0 to 1.0")

    def __call__(self, call: Call) -> str | None:
        is_early = call.step.index < math.floor(self.early * call.step.num_steps + 1e-9)
        is_front = call.span.first == 0
        return "half" if is_early == is_front else None

"""Ways to cut blocks into spans that several methods share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdover.method import Span


@dataclass(frozen=True)
class EachBlock:
    """Every block by itself."""

    def __call__(self, blocks: int) -> Sequence[Span]:
        return [Span(block, block) for block in range(blocks)]


@dataclass(frozen=True)
class ProbeAndTail:
    """The first blocks, the probe, are always computed; the rest is one span, which may look at what they made."""

    probe: int

    def __post_init__(self) -> None:
        if not isinstance(self.probe, int) or self.probe < 0:
            raise ValueError(f"probe={self.probe!r}: give a whole number of blocks, 0 or more")

    def __call__(self, blocks: int) -> Sequence[Span]:
        if self.probe >= blocks:
            raise ValueError(f"probe={self.probe} leaves none of the model's {blocks} blocks to hold over")
        return [*(Span(block, block, "probe") for block in range(self.probe)), Span(self.probe, blocks - 1)]

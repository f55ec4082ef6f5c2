"""Which blocks are held over together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from holdover.engine.slots import Span


class Spans(Protocol):
    def __call__(self, blocks: int) -> Sequence[Span]:
        """Disjoint spans, in order, that cover ``blocks`` blocks."""
        ...


@dataclass(frozen=True)
class EachBlock:
    """Every block by itself."""

    def __call__(self, blocks: int) -> Sequence[Span]:
        return [Span(block, block) for block in range(blocks)]


@dataclass(frozen=True, kw_only=True)
class OneSpan:
    """All blocks as one, the anchors at either end left out."""

    front_anchors: int
    back_anchors: int

    def __call__(self, blocks: int) -> Sequence[Span]:
        first, last = self.front_anchors, blocks - 1 - self.back_anchors
        if first >= last:  # anchors leave one block or none
            return EachBlock()(blocks)
        return [*EachBlock()(first), Span(first, last), *(Span(block, block) for block in range(last + 1, blocks))]

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


@dataclass(frozen=True)
class DeepPart:
    """Of a U-Net's blocks the outer ones, ``shallow`` at either end, are always computed; the others are one span."""

    shallow: int

    def __post_init__(self) -> None:
        if not isinstance(self.shallow, int) or self.shallow < 0:
            raise ValueError(f"shallow={self.shallow!r}: give a whole number of blocks, 0 or more")

    def __call__(self, blocks: int) -> Sequence[Span]:
        first, last = self.shallow, blocks - 1 - self.shallow
        if first > last:
            raise ValueError(f"shallow={self.shallow} leaves none of the model's {blocks} blocks to hold over")
        outer = [Span(block, block, "shallow") for block in (*range(first), *range(last + 1, blocks))]
        return [*outer[:first], Span(first, last), *outer[first:]]


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

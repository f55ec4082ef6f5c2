"""A fixed schedule: the control that every adaptive method must beat at the same number of computed spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from holdover.method import Guard, Policy, Span
from holdover.methods.parts.guards import Anchors, AnyOf, Interval, KVProtection, Protection, WarmUp, one_of
from holdover.methods.parts.predictors import Residual
from holdover.methods.parts.spans import EachBlock
from holdover.methods.parts.triggers import Open


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


def fixed_interval(
    *,
    every: int = 4,
    over: Literal["steps", "chunks"] = "chunks",
    span: Literal["block", "all"] = "block",
    front_anchors: int = 1,
    back_anchors: int = 0,
    warmup: int = 1,
    protection: Protection = "chunk",
) -> Policy:
    """Compute at fixed intervals and hold residuals over in between.

    Args:
        every: over steps, passes 0, every, 2·every, ... of each chunk are computed; over chunks, a slot is
            reused until it was computed ``every`` chunks ago.
        over: ``"steps"`` holds over within a chunk, ``"chunks"`` from one to the next at the same pass index.
        span: hold the residual of each ``"block"``, or one of ``"all"`` blocks between the anchors.
        front_anchors, back_anchors: first and last blocks that are always computed.
        warmup: chunks at a stream's start that are computed.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    one_of("protection", protection, ("chunk", "pass"))
    one_of("span", span, ("block", "all"))
    guards: list[Guard] = [WarmUp(warmup)]
    if protection == "chunk":
        guards.append(KVProtection())
    guards += [Anchors(front_anchors, back_anchors), Interval(every, over)]
    return Policy(
        name="fixed_interval",
        spans=OneSpan(front_anchors=front_anchors, back_anchors=back_anchors) if span == "all" else EachBlock(),
        trigger=Open(guard=AnyOf(tuple(guards))),
        predictor=Residual(),
        per_index=over == "chunks",
        lifetime="stream" if over == "chunks" else "chunk",
    )

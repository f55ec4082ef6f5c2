"""Δ-DiT (arXiv 2406.01125): rear blocks are held over early in a chunk, front blocks late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdover.method import Call, Policy, Span
from holdover.methods.parts.guards import Interval, Protection, for_steps, rounded_down, share_of_steps
from holdover.methods.parts.predictors import Residual
from holdover.methods.parts.triggers import Open


def delta_dit(
    *, every: int = 4, early: float = 0.5, retain: int | float = 0, protection: Protection = "pass"
) -> Policy:
    """Hold over what half of the blocks added, the rear half early, the front half late, but for every N-th step.

    Front blocks draw outlines, which are settled early; rear blocks draw details, which are settled late. Held is the
    paper's Δ, the residual ``y - x`` of the half.

    Left open and chosen here: the halves are equal, the front one rounded down; the steps 0, N, 2N, ... are computed; N
    is 4, which skips the 3/8 of all block calls that the published 1.6x asks for; early is the first half.

    Args:
        every: N, how many steps apart those that are computed in full are.
        early: share of the steps, rounded down, in which the rear half is held over; in the others it is the front.
        retain: first steps that are computed, by number or, as a float, as a share of the steps.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range, or the model has one block only.
    """
    guard = for_steps(retain=retain, last=False, protection=protection) | OneHalf(early) | Interval(every, "steps")
    return Policy(
        name="delta_dit",
        spans=Halves(),
        trigger=Open(guard=guard),
        predictor=Residual(),
        lifetime="chunk",
    )


@dataclass(frozen=True)
class Halves:
    """The front half of the blocks, rounded down, and the rear half."""

    def __call__(self, blocks: int) -> Sequence[Span]:
        if blocks < 2:
            raise ValueError(f"the model's {blocks} block has no halves; name two blocks or more as its slots")
        return [Span(0, blocks // 2 - 1), Span(blocks // 2, blocks - 1)]


@dataclass(frozen=True)
class OneHalf:
    """Computes the front half in a chunk's first steps, the rear half in the others.

    Attributes:
        early: the share of first steps, rounded down.
    """

    early: float

    def __post_init__(self) -> None:
        share_of_steps("early", self.early)

    def __call__(self, call: Call) -> str | None:
        is_early = call.step.index < rounded_down(self.early, call.step.num_steps)
        is_front = call.span.first == 0
        return "half" if is_early == is_front else None

"""PAB, Pyramid Attention Broadcast (arXiv 2408.12588): attention outputs are repeated, each kind for its own while."""

from __future__ import annotations

from dataclasses import dataclass

from holdover.method import Call, Policy
from holdover.methods.parts.guards import Protection, for_steps, rounded_down
from holdover.methods.parts.predictors import Repeat
from holdover.methods.parts.spans import EachBlock
from holdover.methods.parts.triggers import Open


def pab(
    *,
    spatial: int = 2,
    temporal: int = 4,
    cross: int = 6,
    start: float = 0.15,
    stop: float = 0.85,
    protection: Protection = "pass",
) -> Policy:
    """Compute attention every N-th step, N by its kind; in between, repeat what it gave.

    What attention gives changes least in the middle of a chunk, cross-attention least of all and spatial attention
    most, hence the pyramid. The model declares its attention modules as slots of level ``"sublayer"`` and says of which
    kind they are (`holdover.Slot`); attention over space and time at once counts as ``"spatial"``.

    Left open and chosen here: the middle is counted in steps, not in timesteps; within it the steps divisible by N are
    computed; the MLPs are not held over.

    Args:
        spatial, temporal, cross: N by the kind of attention; 1 computes it always.
        start, stop: shares of the steps, rounded down, between which attention is held over.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    by_kind = EveryByKind((("spatial", spatial), ("temporal", temporal), ("cross", cross)))
    return Policy(
        name="pab",
        spans=EachBlock(),
        trigger=Open(guard=for_steps(retain=0, last=False, protection=protection) | Middle(start, stop) | by_kind),
        predictor=Repeat(),
        lifetime="chunk",
        level="sublayer",
    )


@dataclass(frozen=True)
class Middle:
    """Computes the steps before and after the middle of a chunk; its ends are shares, rounded down."""

    start: float
    stop: float

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(f"start={self.start}, stop={self.stop}: give shares of the steps, 0 <= start <= stop <= 1")

    def __call__(self, call: Call) -> str | None:
        start, stop = (rounded_down(share, call.step.num_steps) for share in (self.start, self.stop))
        return None if start <= call.step.index < stop else "retained"


@dataclass(frozen=True)
class EveryByKind:
    """Computes a slot every so many passes of a chunk, by its kind; slots of other kinds always."""

    every: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        for kind, every in self.every:
            if not isinstance(every, int) or every < 1:
                raise ValueError(f"{kind}={every!r}: give a whole number of steps, 1 or more")

    def __call__(self, call: Call) -> str | None:
        every = dict(self.every).get(call.kind)
        if every is None:
            return "kind"
        return "interval" if call.step.index % every == 0 else None

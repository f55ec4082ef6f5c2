"""PAB, Pyramid Attention Broadcast (arXiv 2408.12588): attention outputs are repeated, each kind for its own while."""

from __future__ import annotations

from holdover.methods.parts.gates import Open
from holdover.methods.parts.guards import Protection, for_steps
from holdover.methods.parts.predictors import Repeat
from holdover.methods.parts.spans import EachBlock
from holdover.methods.parts.sublayers import EveryByKind, Middle
from holdover.methods.policy import Policy


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
        guard=for_steps(retain=0, last=False, protection=protection) | Middle(start, stop) | by_kind,
        gate=Open(),
        predictor=Repeat(),
        lifetime="chunk",
        level="sublayer",
    )

"""DeepCache (arXiv 2312.00858): in a U-Net, the deep part is held over while the shallow one goes on."""

from __future__ import annotations

from holdover.methods.parts.gates import Open
from holdover.methods.parts.guards import Interval, Protection, for_steps
from holdover.methods.parts.predictors import Repeat
from holdover.methods.parts.spans import DeepPart
from holdover.methods.policy import Policy


def deepcache(*, every: int = 3, shallow: int = 1, retain: int | float = 0, protection: Protection = "pass") -> Policy:
    """Compute every N-th step in full; in between the outermost blocks, and repeat what those within them gave.

    Slots are the blocks of a U-Net in the order in which it runs them: down, middle, up. A down block that returns
    features for the skip connections as well says with `holdover.Slot`'s ``beside`` what it returns when held over.

    Left open and chosen here: what is held begins and ends with whole blocks, not within one; the steps 0, N, 2N, ...
    are computed.

    Args:
        every: N, how many steps apart those are that are computed in full.
        shallow: outer blocks at either end that are always computed.
        retain: first steps that are computed, by number or, as a float, as a share of the steps.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range, or no block lies within the outer ones.
    """
    return Policy(
        name="deepcache",
        spans=DeepPart(shallow),
        guard=for_steps(retain=retain, last=False, protection=protection) | Interval(every, "steps"),
        gate=Open(),
        predictor=Repeat(),
        lifetime="chunk",
    )

"""FasterCache (arXiv 2410.19355), its CFG-Cache: the unconditional branch is told from the conditional one."""

from __future__ import annotations

from collections.abc import Sequence

from holdover.engine.slots import ViewGroup
from holdover.methods.parts.branches import DatedByGuide, FromGuide, Guided
from holdover.methods.parts.guards import Interval, Protection, for_steps
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.policy import Policy


def fastercache(
    *,
    every: int = 5,
    branch: str = "uncond",
    guide: str = "cond",
    low: float = 1.1,
    high: float = 1.1,
    switch: float = 0.5,
    retain: int | float = 1 / 3,
    grids: Sequence[ViewGroup] = (),
    protection: Protection = "pass",
) -> Policy:
    """Compute the unconditional branch every N-th step; in between, tell it from the conditional output.

    Added to that is the difference between the model's outputs for the two branches when both were last computed,
    weighted by frequency: its low frequencies, up to a fifth of the picture's shorter side, by ``low`` in the first
    part of a chunk, the others by ``high`` in the rest. The conditional branch is always computed, in a pass that
    comes first; as rows of one batch both are.

    Left open and chosen here: the steps 0, N, 2N, ... are computed; the weights do not grow with the steps since then,
    as they do in the released code; parts and shares are counted in steps. Attention is not held over, see `pab`.

    Args:
        every: N, how many steps apart those are at which the unconditional branch is computed.
        branch: the name of the unconditional branch, as `Step` gives it.
        guide: the name of the conditional one.
        low, high: weights of the difference.
        switch: share of the steps, rounded down, that are the first part.
        retain: first steps that are computed, by number or, as a float, as a share of the steps.
        grids: token grids of the model's output, such as its view groups, where that is ``[B, tokens, C]``; by default
            its last two axes are rows and columns.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    if branch == guide:
        raise ValueError(f"branch and guide are both {branch!r}; name the unconditional and the conditional branch")
    guards = for_steps(retain=retain, last=False, protection=protection) | Guided(branch, guide)
    return Policy(
        name="fastercache",
        spans=ProbeAndTail(0),
        guard=guards | Interval(every, "steps"),
        gate=DatedByGuide(guide),
        predictor=FromGuide(guide=guide, low=low, high=high, switch=switch, grids=tuple(grids)),
        lifetime="chunk",
        level="model",
    )

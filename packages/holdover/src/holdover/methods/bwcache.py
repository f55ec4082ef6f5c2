"""BWCache (arXiv 2509.13789): once the outputs of all blocks barely change, they are repeated for a while."""

from __future__ import annotations

from holdover.methods.parts.blockwise import OneForAllBlocks, Output
from holdover.methods.parts.guards import Protection, for_steps
from holdover.methods.parts.spans import EachBlock
from holdover.methods.policy import Policy


def bwcache(
    *, threshold: float = 0.15, run: int | float = 0.1, retain: int | float = 0, protection: Protection = "pass"
) -> Policy:
    """Repeat the outputs of all blocks for R steps once they changed little, on average, from step to step.

    The change of a step is ``mean|y - y'| / mean|y'|`` of every block's output, averaged over the blocks. After R steps
    the blocks are computed again, and the next step is judged by how far that took them.

    Left open and chosen here: ``y'`` is what the block gave when last computed, so that after a run of repeats the
    change spans it; R is rounded down, but at least one.

    Args:
        threshold: of the averaged change.
        run: R, by number or, as a float, as a share of the steps.
        retain: first steps that are computed, by number or, as a float, as a share of the steps.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="bwcache",
        spans=EachBlock(),
        guard=for_steps(retain=retain, last=False, protection=protection),
        gate=OneForAllBlocks(threshold, run),
        predictor=Output(),
        lifetime="chunk",
    )

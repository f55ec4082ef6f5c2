"""FBCache, the first-block cache of ParaAttention (github.com/chengzeyi/ParaAttention): block 0 tells for the rest."""

from __future__ import annotations

from holdover.methods.parts.gates import Below
from holdover.methods.parts.guards import Protection, for_steps
from holdover.methods.parts.predictors import Residual
from holdover.methods.parts.signals import RelativeChange
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.policy import Policy


def fbcache(*, threshold: float = 0.05, protection: Protection = "pass") -> Policy:
    """Reuse the residual of the blocks after the first while the first one's residual has changed little.

    The first block is always computed. Its residual is compared, by relative change (L1), with that of the step at
    which the other blocks were last computed.

    Args:
        threshold: of the relative change.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="fbcache",
        spans=ProbeAndTail(1),
        guard=for_steps(retain=0, last=False, protection=protection),
        gate=Below("change", threshold),
        signal=RelativeChange("probe residual"),
        predictor=Residual(),
        lifetime="chunk",
        reads_entry=True,
    )

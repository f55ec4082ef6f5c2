"""TeaCache (arXiv 2411.19108): the timestep-modulated input tells how far the output has moved."""

from __future__ import annotations

from collections.abc import Sequence

from holdover.policies.parts.gates import Accumulate
from holdover.policies.parts.guards import Protection, for_steps
from holdover.policies.parts.predictors import Residual
from holdover.policies.parts.signals import RelativeChange
from holdover.policies.parts.spans import ProbeAndTail
from holdover.policies.policy import Policy


def teacache(*, threshold: float = 0.1, polynomial: Sequence[float] = (), protection: Protection = "pass") -> Policy:
    """Reuse the residual of all blocks while the first one's modulated input has changed little since it was computed.

    From step to step the relative change (L1) of the timestep-modulated input is mapped by a polynomial fitted to the
    model, and summed; the backbone is computed once the sum reaches the threshold. First and last step are computed.
    The model declares the tap ``modulated`` (`holdover.Slot`).

    Args:
        threshold: of the sum.
        polynomial: its coefficients, highest power first; identity if there are none.
        protection: ``"generation"`` computes generations whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="teacache",
        spans=ProbeAndTail(0),
        guard=for_steps(retain=1, last=True, protection=protection),
        gate=Accumulate(metric="change", threshold=threshold, polynomial=tuple(polynomial)),
        signal=RelativeChange("modulated", follows=True),
        predictor=Residual(),
        lifetime="generation",
    )

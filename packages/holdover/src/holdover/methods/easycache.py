"""EasyCache (arXiv 2507.02860): the rate at which the output follows the input tells how far it has moved."""

from __future__ import annotations

from holdover.methods.parts.guards import Protection, for_steps
from holdover.methods.parts.rate import ExpectedChange, InputStep, LastPair
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.policy import Policy


def easycache(*, threshold: float = 0.025, retain: int | float = 5, protection: Protection = "pass") -> Policy:
    """Reuse the residual of all blocks while the output, as far as its input tells, has moved little since computed.

    With ``x`` and ``y`` what enters and leaves the blocks, each step adds ``K·mean|x_t - x_{t-1}| / mean|y_{t-1}|`` to
    a sum; the blocks are computed once it reaches the threshold, and it begins again at zero. First steps and the last
    are computed.

    Left open and chosen here: ``K = mean|Δy| / mean|Δx|`` is taken between the last two computed steps, however far
    apart; ``x_{t-1}`` and ``y_{t-1}`` are those of the step before, computed or not.

    Args:
        threshold: of the sum.
        retain: first steps that are computed, by number or, as a float, as a share of the steps.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="easycache",
        spans=ProbeAndTail(0),
        guard=for_steps(retain=retain, last=True, protection=protection),
        gate=ExpectedChange(threshold),
        signal=InputStep(),
        predictor=LastPair(),
        lifetime="chunk",
    )

"""DiCache (arXiv 2508.17356): the first blocks, run at every step, decide for the others and steer their stand-in."""

from __future__ import annotations

from holdover.methods.parts.gates import Accumulate
from holdover.methods.parts.guards import Protection
from holdover.methods.parts.probe import Extrapolate, steps_after_probe
from holdover.methods.parts.signals import RelativeChange
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.policy import Policy


def dicache(
    *, threshold: float = 0.08, probe: int = 1, retain: int | float = 0.2, protection: Protection = "pass"
) -> Policy:
    """Extrapolate the residual of the blocks after the probe while the probe's output has drifted little.

    From step to step the relative change (L1) of the probe's output is summed; the tail is computed once the sum
    reaches the threshold, which resets it. Else, with the residuals of the last two computed steps, R1 and R2 of the
    whole backbone, P1 and P2 of the probe, the output is ``x + R2 + γ·(R1 - R2)``, where
    ``γ = mean|P - P2| / mean|P1 - P2|``, clipped to 1..2.

    Args:
        threshold: of the sum.
        probe: first blocks that are always computed.
        retain: first steps that are computed in full, by number or as a share.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="dicache",
        spans=ProbeAndTail(probe),
        guard=steps_after_probe(probe=probe, retain=retain, last=False, protection=protection),
        gate=Accumulate(metric="change", threshold=threshold),
        signal=RelativeChange("input", follows=True),
        predictor=Extrapolate(gamma="ratio", clamp=(1.0, 2.0)),
        lifetime="chunk",
        reads_entry=True,
    )

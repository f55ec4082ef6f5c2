"""MagCache (arXiv 2506.09045): how the residual's magnitude goes from step to step is known from a calibration run."""

from __future__ import annotations

from collections.abc import Sequence

from holdover.engine.snapshot import Snapshot
from holdover.methods.parts.guards import AnyOf, Protection, for_steps
from holdover.methods.parts.magnitude import MagnitudeError, MeasureMagnitudes
from holdover.methods.parts.predictors import Residual
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.policy import Policy


def magcache(
    *,
    ratios: Sequence[float] = (),
    threshold: float = 0.06,
    max_skips: int = 3,
    retain: int | float = 0.2,
    protection: Protection = "pass",
) -> Policy:
    """Reuse the residual of all blocks while, by the calibrated ratios, its magnitude has changed little.

    With ``γ_t`` the ratio of the residual's magnitude at step t to that of the step before, the error ``k`` steps after
    step t is ``|1 - γ_{t+1}···γ_{t+k}|``. The blocks are computed once the sum of these errors reaches the threshold,
    or the residual stood in for too many steps in a row. The ratios belong to a model and its sampler; one run measures
    them::

        with holdover.attach(model, measure_magnitudes()) as cache:
            ...                                                # one chunk
            ratios = magnitude_ratios(cache.snapshot())

    Left open and chosen here: one set of ratios serves all guidance branches.

    Args:
        ratios: γ, one per step; there is no default. The first is not used.
        threshold: of the summed error.
        max_skips: K, steps in a row for which the residual may stand in.
        retain: first steps that are computed, by number or, as a float, as a share of the steps.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range, or there are no ratios. Also in a pass, if they are not one per step.
    """
    return Policy(
        name="magcache",
        spans=ProbeAndTail(0),
        guard=for_steps(retain=retain, last=False, protection=protection),
        gate=MagnitudeError(ratios=tuple(ratios), threshold=threshold, max_skips=max_skips),
        predictor=Residual(),
        lifetime="chunk",
    )


def measure_magnitudes() -> Policy:
    """Compute everything and note the ratios of residual magnitudes, for `magnitude_ratios` to read."""
    return Policy(
        name="measure_magnitudes",
        spans=ProbeAndTail(0),
        guard=AnyOf(()),
        gate=MeasureMagnitudes(),
        predictor=Residual(),
        lifetime="chunk",
    )


def magnitude_ratios(snapshot: Snapshot, branch: str = "") -> tuple[float, ...]:
    """The ratios of the stream's latest chunk, one per step, measured under `measure_magnitudes`.

    Raises:
        ValueError: the snapshot has none of this branch, or the chunk is not finished.
    """
    measured = {held["key"][0]: held["numbers"] for held in snapshot.stream["held"] if "steps" in held["numbers"]}
    if branch not in measured:
        known = ", ".join(map(repr, measured)) or "none"
        raise ValueError(f"no ratios of branch {branch!r}, measured are: {known}; attach measure_magnitudes() first")
    numbers = dict(measured[branch])
    steps = int(numbers.pop("steps"))
    if len(numbers) < steps:
        raise ValueError(f"{len(numbers)} of {steps} passes have run; take the snapshot after a whole chunk")
    return tuple(numbers[str(index)] for index in range(steps))

"""MagCache (arXiv 2506.09045): how the residual's magnitude goes from step to step is known from a calibration run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdover.engine.snapshot import Snapshot
from holdover.method import Call, Policy, Trigger, Verdict
from holdover.methods.parts.guards import First, Protection, at_least_zero, for_steps
from holdover.methods.parts.predictors import Residual, before
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.triggers import Measure

#: Keeps the ratio finite for tokens to which a span added nothing.
EPSILON = 1e-8


def magcache(
    *,
    ratios: Sequence[float] | Mapping[str, Sequence[float]] = (),
    threshold: float = 0.06,
    max_skips: int = 3,
    retain: First = 0.2,
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

    One set of ratios serves all guidance branches, or, as in the released code for Wan, each has its own. The preset
    has that code's other settings.

    Args:
        ratios: γ, one per step; there is no default. The first is not used. Or the ratios of each guidance branch by
            name, in the order in which the branches run: a share of first steps is then one of all passes.
        threshold: of the summed error.
        max_skips: K, steps in a row for which the residual may stand in.
        retain: first steps that are computed: how many, a share of the steps, or a share and a number more.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range, or there are no ratios. Also in a pass, if they are not one per step.
    """
    by_branch = ratios if isinstance(ratios, Mapping) else {}
    return Policy(
        name="magcache",
        spans=ProbeAndTail(0),
        trigger=MagnitudeError(
            guard=for_steps(retain=retain, last=False, protection=protection, branches=tuple(by_branch)),
            ratios=() if isinstance(ratios, Mapping) else tuple(ratios),
            by_branch=tuple((branch, tuple(own)) for branch, own in by_branch.items()),
            threshold=threshold,
            max_skips=max_skips,
        ),
        predictor=Residual(),
        lifetime="chunk",
        guided=tuple(by_branch),
    )


#: The released code's settings for Wan, whose ratios are given as ``{"cond": ..., "uncond": ...}``.
PRESETS = {"released-wan": {"threshold": 0.12, "max_skips": 2, "retain": 0.2}}


def measure_magnitudes() -> Policy:
    """Compute everything and note the ratios of residual magnitudes, for `magnitude_ratios` to read."""
    return Policy(
        name="measure_magnitudes",
        spans=ProbeAndTail(0),
        trigger=MeasureMagnitudes(),
        predictor=Residual(),
        lifetime="chunk",
    )


def magnitude_ratios(snapshot: Snapshot, branch: str = "") -> tuple[float, ...]:
    """The ratios of the stream's latest chunk, one per step, measured under `measure_magnitudes`.

    Raises:
        ValueError: the snapshot has none of this branch, or the chunk is not finished.
    """
    entries = snapshot.streams[0]["entries"]
    measured = {entry["key"][0]: entry["numbers"] for entry in entries if "steps" in entry["numbers"]}
    if branch not in measured:
        known = ", ".join(map(repr, measured)) or "none"
        raise ValueError(f"no ratios of branch {branch!r}, measured are: {known}; attach measure_magnitudes() first")
    numbers = dict(measured[branch])
    steps = int(numbers.pop("steps"))
    if len(numbers) < steps:
        raise ValueError(f"{len(numbers)} of {steps} passes have run; take the snapshot after a whole chunk")
    return tuple(numbers[str(index)] for index in range(steps))


@dataclass(frozen=True, kw_only=True)
class MagnitudeError(Trigger):
    """Reuses while the error that the calibrated ratios foretell, summed since the span was computed, is small.

    ``k`` steps after step ``t``, the magnitude has changed by the product of the ratios of ``t+1`` to ``t+k``; its
    distance from 1 is that step's error.

    Attributes:
        ratios: one per step, for all guidance branches.
        by_branch: where there are any, the ratios of each branch.
    """

    ratios: tuple[float, ...]
    threshold: float
    max_skips: int
    by_branch: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        at_least_zero("threshold", self.threshold)
        if not isinstance(self.max_skips, int) or self.max_skips < 1:
            raise ValueError(f"max_skips={self.max_skips!r}: give a whole number, 1 or more")
        if not self.ratios and not self.by_branch:
            raise ValueError(
                "ratios is empty; give one magnitude ratio per step: attach measure_magnitudes() for one chunk, "
                "then magnitude_ratios(cache.snapshot()), both of holdover.methods.magcache"
            )
        for ratios in (self.ratios, *dict(self.by_branch).values()):
            if not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
                raise ValueError(f"ratios={ratios} are not all positive numbers; measure them again")

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        numbers = call.known.numbers
        ratio = numbers["ratio"] * self._ratios(call)[call.step.index]
        drift, skips = numbers["drift"] + abs(1 - ratio), numbers["skips"] + 1
        reason = "drift" if not drift < self.threshold else "stale" if skips > self.max_skips else None
        kept = {"ratio": ratio, "drift": drift, "skips": skips}
        return Verdict(reason, {"drift": drift, "threshold": self.threshold}, kept)

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        if len(self._ratios(call)) != call.step.num_steps:
            raise ValueError(
                f"magcache has {len(self._ratios(call))} ratios and the chunk {call.step.num_steps} steps; measure the "
                f"ratios with measure_magnitudes() at {call.step.num_steps} steps"
            )
        return {"ratio": 1.0, "drift": 0.0, "skips": 0.0}

    def _ratios(self, call: Call) -> tuple[float, ...]:
        """Those of the call's branch."""
        if not self.by_branch:
            return self.ratios
        own = dict(self.by_branch)
        if call.step.branch not in own:
            raise ValueError(f"magcache has no ratios of branch {call.step.branch!r}, only of {', '.join(own)}")
        return own[call.step.branch]


@dataclass(frozen=True, kw_only=True)
class MeasureMagnitudes(Measure):
    """Keeps, by pass index, the mean over the tokens of ``|r| / |r'|``, the residual's norm over the pass before's."""

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        held = before(call) if y.shape == call.x.shape else None
        if held is None:
            return {"steps": float(call.step.num_steps), str(call.step.index): 1.0}
        norm, residual = torch.linalg.vector_norm, y.float() - call.x.detach().float()
        then = norm(held.tensors["residual"].float(), dim=-1).clamp_min(EPSILON)
        return {**held.numbers, str(call.step.index): (norm(residual, dim=-1) / then).mean().item()}

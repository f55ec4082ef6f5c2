"""X-Cache (arXiv 2604.20289): cross-chunk block caching for few-step autoregressive world models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from holdover.method import Call, Guard, Policy, Trigger, Verdict
from holdover.methods.fingerprint import Fingerprint
from holdover.methods.parts.guards import Anchors, AnyOf, KVProtection, Protection, WarmUp, at_least, one_of
from holdover.methods.parts.predictors import Residual
from holdover.methods.parts.spans import EachBlock

#: The threshold of the relaxed step-0 protection.
STRICT = 0.999

#: So many blocks are decided at once at most.
MOST = 128


def xcache(
    *,
    front_anchors: int = 1,
    back_anchors: int = 0,
    warmup: int = 1,
    tau_floor: float = 0.97,
    margin: float = 0.02,
    alpha: float = 0.30,
    tau_dev: float = 2.00,
    max_staleness: int | None = None,
    protection: Protection = "chunk",
    step0: Literal["off", "full", "relaxed"] = "off",
    tokens: int = 32,
) -> Policy:
    """Reuse a block's residual from the same pass of an earlier chunk while its input has barely changed.

    The defaults are those of the paper's table of settings.

    Args:
        front_anchors: F_n, first blocks that are always computed.
        back_anchors: B_n, last blocks that are always computed.
        warmup: W, chunks at a stream's start that are computed.
        tau_floor: τ_floor, the least cosine at which a block may be reused.
        margin: m, how far the cosine may fall below its running mean.
        alpha: α, weight of the newest cosine in that mean.
        tau_dev: τ_dev, relative deviation of any sampled element from which on a block is computed.
        max_staleness: M, chunks in a row for which a block may be reused; None for no limit.
        protection: ``"chunk"`` computes every block of a chunk whose latents are committed
            (``Step.commits``); ``"pass"`` protects the clean pass alone, and errors accumulate in the KV cache.
        step0: step-0 protection: ``"full"`` computes each chunk's first pass, ``"relaxed"`` asks for a cosine of
            0.999 there.
        tokens: K, sampled tokens per view.

    Raises:
        ValueError: an option is out of range.
    """
    one_of("protection", protection, ("chunk", "pass"))
    one_of("step0", step0, ("off", "full", "relaxed"))
    guards: list[Guard] = [WarmUp(warmup)]
    if protection == "chunk":
        guards.append(KVProtection())
    guards.append(Anchors(front_anchors, back_anchors))
    if step0 == "full":
        guards.append(FirstStep())
    if max_staleness is not None:
        guards.append(Stale(max_staleness))
    return Policy(
        name="xcache",
        spans=EachBlock(),
        trigger=DualMetric(
            guard=AnyOf(tuple(guards)),
            signal=Fingerprint(tokens),
            tau_floor=tau_floor,
            margin=margin,
            alpha=alpha,
            tau_dev=tau_dev,
            strict_first_step=step0 == "relaxed",
        ),
        predictor=Residual(),
        per_index=True,
        look_ahead=MOST,
    )


@dataclass(frozen=True)
class Stale:
    """Computes what would be held over for more than ``max_staleness`` chunks in a row."""

    max_staleness: int

    def __post_init__(self) -> None:
        at_least("max_staleness", self.max_staleness, 1)

    def __call__(self, call: Call) -> str | None:
        return "stale" if call.entry and call.chunk - call.entry.chunk > self.max_staleness else None


@dataclass(frozen=True)
class FirstStep:
    """Computes the first denoising pass of a chunk."""

    def __call__(self, call: Call) -> str | None:
        return "step 0" if call.step.index == 0 else None


@dataclass(frozen=True, kw_only=True)
class DualMetric(Trigger):
    """The dual-metric gate: cosine against a threshold that follows it, and the largest deviation.

    With ``s`` the least cosine of the fingerprint's entries and ``d`` the deviation, the running mean starts at the
    first ``s`` and becomes ``alpha·s + (1-alpha)·mean``. Reuse if ``s >= max(tau_floor, mean - margin)`` and
    ``d < tau_dev``.

    Attributes:
        action: take the cosine of what each frame is told with what it was told then as one more entry. Where the step
            has no ``frame_actions``, that is the chunk's action.
        strict_first_step: at the first denoising pass the threshold is 0.999.
    """

    tau_floor: float
    margin: float
    alpha: float
    tau_dev: float
    action: bool = True
    strict_first_step: bool = False

    def __post_init__(self) -> None:
        # A floor above 1 is allowed: it is the gate that never opens.
        for name, low, high in (("tau_floor", -1.0, 2.0), ("margin", 0.0, 2.0), ("alpha", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is not between {low:g} and {high:g}")
        if not self.tau_dev >= 0:
            raise ValueError(f"tau_dev={self.tau_dev} is negative; give the relative deviation to stay below")

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        cosine, deviation = metrics["cosine"], metrics["deviation"]
        if self.action:
            cosine = min(cosine, told_cosine(call.step.told, call.known.action))
        mean = call.known.numbers.get("mean_cosine", cosine)
        mean = self.alpha * cosine + (1 - self.alpha) * mean
        threshold = max(self.tau_floor, mean - self.margin)
        if self.strict_first_step and call.step.index == 0:
            threshold = STRICT
        reason = None
        if cosine < threshold:
            reason = "cosine"
        elif deviation >= self.tau_dev:
            reason = "deviation"
        scores = {"cosine": cosine, "threshold": threshold, "deviation": deviation}
        return Verdict(reason, scores, {"mean_cosine": mean})


def told_cosine(a: tuple[tuple[float, ...], ...] | None, b: tuple[tuple[float, ...], ...] | None) -> float:
    """The least cosine, frame by frame, of what two passes are told; 0 if one has other frames or is told nothing."""
    if a is None or b is None:
        return float(a is b)
    return min(map(vector_cosine, a, b)) if len(a) == len(b) else 0.0


def vector_cosine(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Cosine of two actions: 1 if both are zero, 0 if one is, or if they differ in dimensions."""
    if len(a) != len(b):
        return 0.0
    norm_a, norm_b = math.hypot(*a), math.hypot(*b)
    if norm_a == 0 or norm_b == 0:
        return float(norm_a == norm_b)
    return sum(x / norm_a * (y / norm_b) for x, y in zip(a, b, strict=True))

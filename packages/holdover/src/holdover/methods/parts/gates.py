"""Gates decide where no guard did."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from holdover.engine.contract import Call, Verdict

#: The threshold of X-Cache's relaxed step-0 protection.
STRICT = 0.999


class Gate:
    """Decides by metrics and by the numbers it keeps with the slot."""

    @abstractmethod
    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict: ...

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        """By default the numbers stay as they are."""
        return call.held.numbers if call.held else {}


@dataclass(frozen=True)
class Open(Gate):
    """Reuses whatever no guard forbids."""

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        return Verdict(None)


@dataclass(frozen=True)
class Never(Gate):
    """Computes everything that no guard does, for policies that only measure."""

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        return Verdict("never")


@dataclass(frozen=True, kw_only=True)
class DualMetric(Gate):
    """X-Cache's gate: cosine against a threshold that follows it, and the largest deviation (arXiv 2604.20289).

    With ``s`` the least cosine of the fingerprint's entries and ``d`` the deviation, the running mean starts at the
    first ``s`` and becomes ``alpha·s + (1-alpha)·mean``. Reuse if ``s >= max(tau_floor, mean - margin)`` and
    ``d < tau_dev``.

    Attributes:
        action: take the cosine of the chunk's action with the held one as one more entry.
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
        assert call.held is not None
        cosine, deviation = metrics["cosine"], metrics["deviation"]
        if self.action:
            cosine = min(cosine, vector_cosine(call.step.action_vector, call.held.action))
        mean = call.held.numbers.get("mean_cosine", cosine)
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


def vector_cosine(a: tuple[float, ...] | None, b: tuple[float, ...] | None) -> float:
    """Cosine of two actions: 1 if both are zero or absent, 0 if one is, or if they differ in dimensions."""
    if a is None or b is None:
        return float(a is b)
    if len(a) != len(b):
        return 0.0
    norm_a, norm_b = math.hypot(*a), math.hypot(*b)
    if norm_a == 0 or norm_b == 0:
        return float(norm_a == norm_b)
    return sum(x / norm_a * (y / norm_b) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Below(Gate):
    """Reuses while a metric stays below a threshold."""

    metric: str
    threshold: float

    def __post_init__(self) -> None:
        at_least_zero("threshold", self.threshold)

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        reason = None if metrics[self.metric] < self.threshold else self.metric
        return Verdict(reason, {**metrics, "threshold": self.threshold})


@dataclass(frozen=True, kw_only=True)
class Accumulate(Gate):
    """Reuses while a metric, summed since the span was last computed, stays below a threshold.

    Attributes:
        polynomial: maps the metric before it is summed, highest power first, as ``numpy.polyval``; identity if empty.
    """

    metric: str
    threshold: float
    polynomial: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        at_least_zero("threshold", self.threshold)
        if not all(map(math.isfinite, self.polynomial)):
            raise ValueError(f"polynomial={self.polynomial} is not finite; give its coefficients, highest power first")

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        assert call.held is not None
        drift = call.held.numbers.get("drift", 0.0) + self._mapped(metrics[self.metric])
        reason = None if drift < self.threshold else "drift"
        return Verdict(reason, {**metrics, "drift": drift, "threshold": self.threshold}, {"drift": drift})

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        return {"drift": 0.0}

    def _mapped(self, value: float) -> float:
        if not self.polynomial:
            return value
        result = 0.0
        for coefficient in self.polynomial:
            result = result * value + coefficient
        return result


def at_least_zero(name: str, value: float) -> None:
    """Raise a ValueError for a negative option, or one that is not a number."""
    if not value >= 0:
        raise ValueError(f"{name}={value} is negative; give 0 or more")

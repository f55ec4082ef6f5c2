"""Triggers that several methods share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from holdover.method import Call, Trigger, Verdict
from holdover.methods.parts.guards import at_least_zero


@dataclass(frozen=True, kw_only=True)
class Open(Trigger):
    """Reuses whatever the guard does not forbid."""

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        return Verdict(None)


@dataclass(frozen=True, kw_only=True)
class Measure(Trigger):
    """Computes everything, for policies that only measure."""

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        return Verdict("never")


@dataclass(frozen=True, kw_only=True)
class Accumulate(Trigger):
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
        drift = call.known.numbers.get("drift", 0.0) + self._mapped(metrics[self.metric])
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

"""MagCache's parts: by how much a span's residual grows or shrinks from step to step (arXiv 2506.09045)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdover.engine.contract import Call, Verdict
from holdover.methods.parts.gates import Gate, Never, at_least_zero
from holdover.methods.parts.history import before

#: Keeps the ratio finite for tokens to which a span added nothing.
EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class MagnitudeError(Gate):
    """Reuses while the error that the calibrated ratios foretell, summed since the span was computed, is small.

    ``k`` steps after step ``t``, the magnitude has changed by the product of the ratios of ``t+1`` to ``t+k``; its
    distance from 1 is that step's error.
    """

    ratios: tuple[float, ...]
    threshold: float
    max_skips: int

    def __post_init__(self) -> None:
        at_least_zero("threshold", self.threshold)
        if not isinstance(self.max_skips, int) or self.max_skips < 1:
            raise ValueError(f"max_skips={self.max_skips!r}: give a whole number, 1 or more")
        if not self.ratios:
            raise ValueError(
                "ratios is empty; give one magnitude ratio per step: attach measure_magnitudes() for one chunk, "
                "then magnitude_ratios(cache.snapshot()), both of holdover.methods.magcache"
            )
        if not all(math.isfinite(ratio) and ratio > 0 for ratio in self.ratios):
            raise ValueError(f"ratios={self.ratios} are not all positive numbers; measure them again")

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        assert call.held is not None
        numbers = call.held.numbers
        ratio = numbers["ratio"] * self.ratios[call.step.index]
        drift, skips = numbers["drift"] + abs(1 - ratio), numbers["skips"] + 1
        reason = "drift" if not drift < self.threshold else "stale" if skips > self.max_skips else None
        kept = {"ratio": ratio, "drift": drift, "skips": skips}
        return Verdict(reason, {"drift": drift, "threshold": self.threshold}, kept)

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        if len(self.ratios) != call.step.num_steps:
            raise ValueError(
                f"magcache has {len(self.ratios)} ratios and the chunk {call.step.num_steps} steps; measure the "
                f"ratios with measure_magnitudes() at {call.step.num_steps} steps"
            )
        return {"ratio": 1.0, "drift": 0.0, "skips": 0.0}


@dataclass(frozen=True)
class MeasureMagnitudes(Never):
    """Keeps, by pass index, the mean over the tokens of ``|r| / |r'|``, the residual's norm over the pass before's."""

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        held = before(call) if y.shape == call.x.shape else None
        if held is None:
            return {"steps": float(call.step.num_steps), str(call.step.index): 1.0}
        norm, residual = torch.linalg.vector_norm, y.float() - call.x.detach().float()
        then = norm(held.tensors["residual"].float(), dim=-1).clamp_min(EPSILON)
        return {**held.numbers, str(call.step.index): (norm(residual, dim=-1) / then).mean().item()}

"""EasyCache's parts: how far a span's output moves for each step of its input (arXiv 2507.02860)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdover.engine.contract import Call, Kept, Verdict
from holdover.engine.slots import ViewGroup
from holdover.methods.parts.gates import Gate, at_least_zero
from holdover.methods.parts.history import before
from holdover.methods.parts.predictors import Predictor
from holdover.methods.parts.signals import relative


@dataclass(frozen=True)
class InputStep:
    """How far the span's input moved since the latest pass: the metric ``moved`` is ``mean|now - then|``."""

    follows: ClassVar[bool] = True
    reads_layout: ClassVar[bool] = False

    def prepare(self, shape: torch.Size, device: torch.device, view_groups: tuple[ViewGroup, ...]) -> InputStepReading:
        return InputStepReading()


class InputStepReading:
    def read(self, call: Call) -> Tensor:
        return call.x.detach().to(torch.float32, copy=True)

    def compare(self, now: Tensor, then: Tensor) -> Tensor:
        return (now - then).abs().mean().reshape(1)

    def metrics(self, numbers: Sequence[float]) -> dict[str, float]:
        return {"moved": numbers[0]}


@dataclass(frozen=True)
class ExpectedChange(Gate):
    """Reuses while the output's expected relative change, summed since the span was computed, is below a threshold.

    The change expected of a step is ``rate * moved / size``: ``moved`` is how far the input went, ``size`` is
    ``mean|y|`` of the latest pass, ``rate`` is ``mean|y - y'| / mean|x - x'|`` between the last two computed passes.
    """

    threshold: float

    def __post_init__(self) -> None:
        at_least_zero("threshold", self.threshold)

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        assert call.held is not None
        numbers = call.held.numbers
        if "rate" not in numbers:
            return Verdict("history")
        change = relative(numbers["rate"] * metrics["moved"], numbers["size"])
        drift = numbers["drift"] + change
        reason = None if drift < self.threshold else "drift"
        return Verdict(reason, {"change": change, "drift": drift, "threshold": self.threshold}, {"drift": drift})

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        x, held = call.x.detach(), before(call) if y.shape == call.x.shape else None
        then_x, then_y = (held.tensors["input"], held.tensors["output"]) if held else (x, y)
        steps = y.float(), y.float() - then_y.float(), x.float() - then_x.float()
        size, moved_y, moved_x = torch.stack([step.abs().mean() for step in steps]).tolist()
        numbers = {"drift": 0.0, "size": size}
        if moved_x:  # an input that stood still says nothing of the rate
            numbers["rate"] = moved_y / moved_x
        elif held and "rate" in held.numbers:
            numbers["rate"] = held.numbers["rate"]
        return numbers


@dataclass(frozen=True)
class LastPair(Predictor):
    """Adds what the span added when last computed, keeping its input and output apart; notes the output's size."""

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"input": call.x.detach().clone(), "output": y.clone()}

    def predict(self, call: Call) -> Tensor:
        assert call.held is not None
        return call.x + (call.held.tensors["output"] - call.held.tensors["input"])

    def reused(self, call: Call, y: Tensor) -> Kept:
        return Kept(numbers={"size": y.detach().float().abs().mean().item()})

"""EasyCache (arXiv 2507.02860): the rate at which the output follows the input tells how far it has moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from holdover.method import Call, Policy, Predictor, Signal, Trigger, Verdict
from holdover.methods.parts.guards import First, Protection, at_least_zero, for_steps, one_of
from holdover.methods.parts.predictors import before
from holdover.methods.parts.signals import relative
from holdover.methods.parts.spans import ProbeAndTail


def easycache(
    *,
    threshold: float = 0.025,
    size_of: Literal["latest", "computed"] = "latest",
    level: Literal["block", "model"] = "block",
    one_decision: bool = False,
    retain: First = 5,
    protection: Protection = "pass",
) -> Policy:
    """Reuse the residual of all blocks while the output, as far as its input tells, has moved little since computed.

    With ``x`` and ``y`` what enters and leaves the blocks, each step adds ``K·mean|x_t - x_{t-1}| / mean|y_{t-1}|`` to
    a sum; the blocks are computed once it reaches the threshold, and it begins again at zero. First steps and the last
    are computed.

    Left open and chosen here: ``K = mean|Δy| / mean|Δx|`` is taken between the last two computed steps, however far
    apart; ``x_{t-1}`` and ``y_{t-1}`` are those of the step before, computed or not. In the released code ``y_{t-1}``
    is the latest computed one; x and y are the latents that enter the model and what it returns. The presets are that
    code's settings for HunyuanVideo and for Wan.

    Args:
        threshold: of the sum.
        size_of: ``mean|y|`` is that of the ``"latest"`` step, or of the latest ``"computed"`` one.
        level: x and y enter and leave the ``"block"``s together, or the ``"model"``. The model must return the shape
            that enters; else every step is computed.
        one_decision: guidance branches follow the decision of the first.
        retain: first steps that are computed: how many, a share of the steps, or a share and a number more.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    one_of("level", level, ("block", "model"))
    return Policy(
        name="easycache",
        spans=ProbeAndTail(0),
        trigger=ExpectedChange(
            guard=for_steps(retain=retain, last=True, protection=protection), signal=InputStep(), threshold=threshold
        ),
        predictor=LastPair(size_of),
        lifetime="chunk",
        level=level,
        one_for_all_branches=one_decision,
    )


_RELEASED = {"size_of": "computed", "level": "model"}

#: The released code's settings for HunyuanVideo and for Wan.
PRESETS = {
    "released": {**_RELEASED, "threshold": 0.025, "retain": 5},
    "released-wan": {**_RELEASED, "threshold": 0.05, "retain": 10, "one_decision": True},
}


@dataclass(frozen=True)
class InputStep(Signal):
    """How far the span's input moved since the latest pass: the metric ``moved`` is ``mean|now - then|``."""

    follows: bool = True

    def read(self, call: Call) -> Tensor:
        return call.x.detach().to(torch.float32, copy=True)

    def compare(self, now: Tensor, then: Tensor) -> Tensor:
        return (now - then).abs().mean().reshape(1)

    def metrics(self, numbers: Sequence[float]) -> dict[str, float]:
        return {"moved": numbers[0]}


@dataclass(frozen=True, kw_only=True)
class ExpectedChange(Trigger):
    """Reuses while the output's expected relative change, summed since the span was computed, is below a threshold.

    The change expected of a step is ``rate * moved / size``: ``moved`` is how far the input went, ``size`` is
    ``mean|y|`` as `LastPair` has it, ``rate`` is ``mean|y - y'| / mean|x - x'|`` between the last two computed passes.
    """

    threshold: float

    def __post_init__(self) -> None:
        at_least_zero("threshold", self.threshold)

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        numbers = call.known.numbers
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
    """Adds what the span added when last computed, keeping its input and output apart.

    With ``size_of="latest"`` it notes the size of what it gives.
    """

    size_of: Literal["latest", "computed"] = "latest"

    def __post_init__(self) -> None:
        one_of("size_of", self.size_of, ("latest", "computed"))

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"input": call.x.detach().clone(), "output": y.clone()}

    def predict(self, call: Call) -> Tensor:
        return call.x + (call.known.tensors["output"] - call.known.tensors["input"])

    def reused(self, call: Call, y: Tensor) -> Mapping[str, Tensor | float]:
        return {"size": y.detach().float().abs().mean().item()} if self.size_of == "latest" else {}

"""FasterCache's parts: one guidance branch's output, told from another's (arXiv 2410.19355, CFG-Cache)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdover.engine.contract import Call
from holdover.engine.slots import ViewGroup
from holdover.engine.state import Held
from holdover.methods.parts.gates import Open, at_least_zero
from holdover.methods.parts.guards import Guard
from holdover.methods.parts.pictures import check_grids, join, split
from holdover.methods.parts.predictors import Predictor


def guide_of(call: Call, guide: str) -> Held | None:
    """What is held of the same span in the guiding branch, if that was computed at this very step."""
    held = call.peer(call.span.first, guide) if call.step.branch != guide else None
    if held is None or held.void is not None or held.numbers["index"] != call.step.index:
        return None
    return held if held.shape == call.x.shape else None


@dataclass(frozen=True)
class Guided(Guard):
    """Computes every branch but one, and that one too unless its guide has just run and their difference is known."""

    branch: str
    guide: str

    def __call__(self, call: Call) -> str | None:
        guide = guide_of(call, self.guide) if call.step.branch == self.branch else None
        if guide is None:
            return "guide"
        if call.held is None or call.held.void is not None:
            return None
        if "epoch" not in call.held.numbers:
            return "history"
        return "condition" if call.held.numbers["epoch"] != guide.epoch else None


@dataclass(frozen=True)
class DatedByGuide(Open):
    """Reuses whatever no guard forbids; notes the pass, and how often the guide's condition had changed by then."""

    guide: str

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        guide, numbers = guide_of(call, self.guide), {"index": float(call.step.index)}
        return numbers if guide is None else numbers | {"epoch": float(guide.epoch)}


@dataclass(frozen=True, kw_only=True)
class FromGuide(Predictor):
    """Adds to the guide's output of this step the difference between the two, weighted by frequency.

    Attributes:
        low, high: weights of the low frequencies in the first part of a chunk, of the others in the second.
        switch: share of the steps, rounded down, that are the first part.
        grids: of the tokens; if there are none, the last two axes are rows and columns.
    """

    guide: str
    low: float
    high: float
    switch: float
    grids: tuple[ViewGroup, ...]
    adds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least_zero("low", self.low)
        at_least_zero("high", self.high)
        if not 0 <= self.switch <= 1:
            raise ValueError(f"switch={self.switch} is not a share of the steps; give 0.0 to 1.0")
        check_grids("grids", self.grids)

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if call.step.branch == self.guide:
            return {"output": y.clone()}
        guide = guide_of(call, self.guide)
        return {} if guide is None else {"difference": y.float() - guide.tensors["output"].float()}

    def predict(self, call: Call) -> Tensor:
        guide = guide_of(call, self.guide)
        assert call.held is not None
        assert guide is not None
        difference = call.held.tensors["difference"]
        low = self._low(difference)
        early = call.step.index < math.floor(self.switch * call.step.num_steps + 1e-9)
        weighted = self.low * low + (difference - low) if early else low + self.high * (difference - low)
        return guide.tensors["output"].float() + weighted

    def _low(self, x: Tensor) -> Tensor:
        if not self.grids:
            return low_frequencies(x)
        pictures = [low_frequencies(part.movedim(-1, 1)).movedim(1, -1) for part in split(x, self.grids)]
        return join(pictures, self.grids, x.shape[0])


def low_frequencies(x: Tensor) -> Tensor:
    """What of pictures ``[..., H, W]`` varies slowly: at most a fifth of the shorter side's length in cycles."""
    h, w = x.shape[-2:]
    down, across = (torch.fft.fftfreq(n, 1 / n, device=x.device) for n in (h, w))
    slow_HW = down[:, None] ** 2 + across**2 <= (min(h, w) // 5) ** 2
    low: Tensor = torch.fft.ifft2(torch.fft.fft2(x) * slow_HW).real
    return low

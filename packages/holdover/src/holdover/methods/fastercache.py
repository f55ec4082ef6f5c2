"""FasterCache (arXiv 2410.19355), its CFG-Cache: the unconditional branch is told from the conditional one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdover.method import Call, Entry, Policy, Predictor
from holdover.methods.parts.guards import (
    Interval,
    Protection,
    at_least_zero,
    for_steps,
    rounded_down,
    share_of_steps,
)
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.triggers import Open
from holdover.slot import ViewGroup, check_grids, join_views, split_views


def fastercache(
    *,
    every: int = 5,
    branch: str = "uncond",
    guide: str = "cond",
    low: float = 1.1,
    high: float = 1.1,
    switch: float = 0.5,
    retain: int | float = 1 / 3,
    grids: Sequence[ViewGroup] = (),
    protection: Protection = "pass",
) -> Policy:
    """Compute the unconditional branch every N-th step; in between, tell it from the conditional output.

    Added to that is the difference between the model's outputs for the two branches when both were last computed,
    weighted by frequency: its low frequencies, up to a fifth of the picture's shorter side, by ``low`` in the first
    part of a chunk, the others by ``high`` in the rest. The conditional branch is always computed, in a pass that
    comes first; as rows of one batch both are.

    Left open and chosen here: the steps 0, N, 2N, ... are computed; the weights do not grow with the steps since then,
    as they do in the released code; parts and shares are counted in steps. Attention is not held over, see `pab`.

    Args:
        every: N, how many steps apart those are at which the unconditional branch is computed.
        branch: the name of the unconditional branch, as `Step` gives it.
        guide: the name of the conditional one.
        low, high: weights of the difference.
        switch: share of the steps, rounded down, that are the first part.
        retain: first steps that are computed, by number or, as a float, as a share of the steps.
        grids: token grids of the model's output, such as its view groups, where that is ``[B, tokens, C]``; by default
            its last two axes are rows and columns.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    if branch == guide:
        raise ValueError(f"branch and guide are both {branch!r}; name the unconditional and the conditional branch")
    guard = for_steps(retain=retain, last=False, protection=protection) | Guided(branch, guide)
    return Policy(
        name="fastercache",
        spans=ProbeAndTail(0),
        trigger=DatedByGuide(guard=guard | Interval(every, "steps"), guide=guide),
        predictor=FromGuide(guide=guide, low=low, high=high, switch=switch, grids=tuple(grids)),
        lifetime="chunk",
        level="model",
        guided=(guide, branch),
    )


def guide_of(call: Call, guide: str) -> Entry | None:
    """The entry of the same span in the guiding branch, if that was computed at this very step."""
    entry = call.peer(call.span.first, guide) if call.step.branch != guide else None
    if entry is None or entry.void is not None or entry.numbers["index"] != call.step.index:
        return None
    return entry if entry.shape == call.x.shape else None


@dataclass(frozen=True)
class Guided:
    """Computes every branch but one, and that one too unless its guide has just run and their difference is known."""

    branch: str
    guide: str

    def __call__(self, call: Call) -> str | None:
        guide = guide_of(call, self.guide) if call.step.branch == self.branch else None
        if guide is None:
            return "guide"
        if call.entry is None or call.entry.void is not None:
            return None
        if "epoch" not in call.entry.numbers:
            return "history"
        return "condition" if call.entry.numbers["epoch"] != guide.epoch else None


@dataclass(frozen=True, kw_only=True)
class DatedByGuide(Open):
    """Reuses whatever the guard does not forbid. It notes the pass, and the guide's count of condition changes then."""

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
        share_of_steps("switch", self.switch)
        check_grids("grids", self.grids)

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if call.step.branch == self.guide:
            return {"output": y.clone()}
        guide = guide_of(call, self.guide)
        return {} if guide is None else {"difference": y.float() - guide.tensors["output"].float()}

    def predict(self, call: Call) -> Tensor:
        guide = guide_of(call, self.guide)
        assert guide is not None
        difference = call.known.tensors["difference"]
        low = self._low(difference)
        early = call.step.index < rounded_down(self.switch, call.step.num_steps)
        weighted = self.low * low + (difference - low) if early else low + self.high * (difference - low)
        return guide.tensors["output"].float() + weighted

    def _low(self, x: Tensor) -> Tensor:
        if not self.grids:
            return low_frequencies(x)
        pictures = [low_frequencies(part.movedim(-1, 1)).movedim(1, -1) for part in split_views(x, self.grids)]
        return join_views(pictures, self.grids, x.shape[0])


def low_frequencies(x: Tensor) -> Tensor:
    """What of pictures ``[..., H, W]`` varies slowly: at most a fifth of the shorter side's length in cycles."""
    h, w = x.shape[-2:]
    down, across = (torch.fft.fftfreq(n, 1 / n, device=x.device) for n in (h, w))
    slow_HW = down[:, None] ** 2 + across**2 <= (min(h, w) // 5) ** 2
    low: Tensor = torch.fft.ifft2(torch.fft.fft2(x) * slow_HW).real
    return low

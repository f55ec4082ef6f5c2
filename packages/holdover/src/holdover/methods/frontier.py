"""Frontier: within a cycle that draws one window again and again, only the latent frame about to be shown is computed.

The first chunk of a cycle draws all latent frames of a window. Each later chunk draws the same window under a newer
action, and shows one more frame of it. What was shown before barely changes; what comes later will be drawn again when
it is due. So a later chunk computes the tokens of its frame alone, with the keys and values that all other frames had
when they were last computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from holdover.method import Call, Policy, Trigger, Verdict
from holdover.methods.parts.guards import AnyOf, KVProtection, one_of
from holdover.methods.parts.predictors import Residual
from holdover.methods.parts.spans import ProbeAndTail
from holdover.step import Step

#: When the frames after the one to be shown are computed as well.
Later = Literal["never", "revised", "always"]


def frontier(*, later: Later = "never") -> Policy:
    """Compute the latent frame that a chunk will show; the others keep the keys and values that they had.

    For a loop that draws a window several times with the same noise and says which latent frame a chunk will show
    (``Step.shown``). Computed whole are: the first chunk of a cycle, which is one that comes ``shown`` chunk numbers
    before this one; a chunk whose latents are committed; and one whose condition changed. Keys and values are held for
    each pass index and block. The output of the frames that are left out is the residual of all blocks, added to what
    enters; no later chunk shows it.

    The model says how the tokens of a latent frame are laid out (view groups), and its blocks how some tokens are
    computed given the keys and values of the others (`Slot.part`).

    Args:
        later: when the frames after the one to be shown are computed as well: ``"never"``; ``"revised"``, where they
            are told something else than when they were last computed (``Step.frame_actions``, else the newest action
            stands for all of them); or ``"always"``.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="frontier",
        spans=ProbeAndTail(0),
        trigger=FrameToShow(guard=AnyOf((KVProtection(), NeedsShown())), later=later),
        predictor=Residual(),
        per_index=True,
        parts=("block",),
    )


@dataclass(frozen=True)
class NeedsShown:
    """Computes a chunk of which the loop does not say what it will show."""

    def __call__(self, call: Call) -> str | None:
        return "needs Step.shown" if call.step.shown is None else None


@dataclass(frozen=True, kw_only=True)
class FrameToShow(Trigger):
    """Computes the tokens of the latent frame to be shown, where the span was computed in this cycle.

    Attributes:
        later: when the frames after it are computed as well.
    """

    by_frame: ClassVar[bool] = True
    later: Later

    def __post_init__(self) -> None:
        one_of("later", self.later, get_args(Later))

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        step, known = call.step, call.known.numbers
        per_frame, shown = _tokens_per_frame(call), step.shown
        frames = _tokens(call.x) // per_frame
        assert shown is not None  # the guard has seen to it
        if shown >= frames:
            raise ValueError(f"shown={shown} is not one of the pass's {frames} latent frames; count them from 0")
        if known["chunk"] < step.chunk - shown:
            return Verdict("new window")
        numbers = self._told(step, range(shown, frames))
        ahead = self._told(step, range(shown + 1, frames))
        revised = any(known.get(name) != value for name, value in ahead.items())
        until = frames if revised or self.later == "always" else shown + 1
        part = torch.arange(shown * per_frame, until * per_frame, device=call.x.device)
        drafts = (*range(shown), *range(until, frames))
        return Verdict(None, {"recomputed": (until - shown) / frames}, numbers, part, drafts)

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        frames = _tokens(call.x) // _tokens_per_frame(call)
        return {"chunk": call.step.chunk, **self._told(call.step, range(frames))}

    def _told(self, step: Step, frames: range) -> Mapping[str, float]:
        """What frames are told, number by number, as far as that decides anything."""
        told = step.told
        if self.later != "revised" or told is None:
            return {}
        rows = {frame: told[frame] if len(told) > 1 else told[0] for frame in frames}
        return {f"told {frame} {n}": value for frame, row in rows.items() for n, value in enumerate(row)}


def _tokens(x: Tensor) -> int:
    """L."""
    return x.shape[1:-1].numel()


def _tokens_per_frame(call: Call) -> int:
    """By the view groups.

    Raises:
        ValueError: there are none, or the pass's tokens are not whole frames of them.
    """
    per_frame, tokens = sum(group.tokens for group in call.view_groups), _tokens(call.x)
    if not per_frame or tokens % per_frame:
        raise ValueError(
            f"the {tokens} tokens of a pass are not whole latent frames of view_groups={call.view_groups}; give the "
            f"grids of one latent frame: attach(view_groups=[holdover.ViewGroup(...)])"
        )
    return per_frame

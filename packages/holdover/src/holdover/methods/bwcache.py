"""BWCache (arXiv 2509.13789): once the outputs of all blocks barely change, they are repeated for a while."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdover.method import Call, Policy, Trigger, Verdict
from holdover.methods.parts.guards import Protection, at_least_zero, for_steps, rounded_down
from holdover.methods.parts.predictors import Repeat, before
from holdover.methods.parts.signals import relative
from holdover.methods.parts.spans import EachBlock


def bwcache(
    *, threshold: float = 0.15, run: int | float = 0.1, retain: int | float = 0, protection: Protection = "pass"
) -> Policy:
    """Repeat the outputs of all blocks for R steps once they changed little, on average, from step to step.

    The change of a step is ``mean|y - y'| / mean|y'|`` of every block's output, averaged over the blocks. After R steps
    the blocks are computed again, and the next step is judged by how far that took them.

    Left open and chosen here: ``y'`` is what the block gave when last computed, so that after a run of repeats the
    change spans it; R is rounded down, but at least one.

    Args:
        threshold: of the averaged change.
        run: R, by number or, as a float, as a share of the steps.
        retain: first steps that are computed, by number or, as a float, as a share of the steps.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="bwcache",
        spans=EachBlock(),
        trigger=OneForAllBlocks(
            guard=for_steps(retain=retain, last=False, protection=protection), threshold=threshold, run=run
        ),
        predictor=Output(),
        lifetime="chunk",
    )


@dataclass(frozen=True)
class Output(Repeat):
    """Repeats what a span gave, and holds, as its signal, ``mean|y - y'|`` and ``mean|y'|``.

    ``y'`` is what it had given the time before.
    """

    adds: ClassVar[bool] = True

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors, held = super().remember(call, y, spare), before(call)
        if held is not None:
            then = held.tensors["output"].float()
            tensors["signal"] = torch.stack([(y.float() - then).abs().mean(), then.abs().mean()])
        return tensors


@dataclass(frozen=True, kw_only=True)
class OneForAllBlocks(Trigger):
    """Reuses all blocks for a run of passes, once their outputs changed little on average. Goes with `Output`.

    The first block decides and the others follow.

    Attributes:
        threshold: of the relative change (L1) of a block's output, averaged over the blocks.
        run: passes in a row, by number or as a share of the passes, rounded down but at least one.
    """

    threshold: float
    run: int | float

    def __post_init__(self) -> None:
        at_least_zero("threshold", self.threshold)
        whole = isinstance(self.run, int) and self.run >= 1
        if not whole and not (isinstance(self.run, float) and 0 < self.run <= 1):
            raise ValueError(f"run={self.run!r}: give a whole number of steps, 1 or more, or a share of them up to 1.0")

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        if call.span.first > 0:
            first = call.peer(0)
            return Verdict(None if first and first.numbers.get("reused") else "led")
        reused = call.known.numbers["reused"]
        if reused:
            return Verdict("stale") if reused >= self._length(call) else Verdict(None, {}, {"reused": reused + 1})
        peers = [call.peer(block) for block in range(call.blocks)]
        signals = [peer.tensors["signal"] for peer in peers if peer and "signal" in peer.tensors]
        if not signals:
            return Verdict("history")
        pairs = torch.stack(signals).tolist()
        change = sum(relative(moved, size) for moved, size in pairs) / len(pairs)
        scores = {"change": change, "threshold": self.threshold}
        if math.isnan(change):
            return Verdict("nan", scores)
        return Verdict(None, scores, {"reused": 1.0}) if change < self.threshold else Verdict("change", scores)

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        return {"reused": 0.0}

    def _length(self, call: Call) -> int:
        if isinstance(self.run, int):
            return self.run
        return max(1, rounded_down(self.run, call.step.num_steps))

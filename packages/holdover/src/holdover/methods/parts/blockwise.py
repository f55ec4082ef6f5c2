"""BWCache's parts: every block holds its output, and one decision stands for all of them (arXiv 2509.13789)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdover.engine.contract import Call, Verdict
from holdover.methods.parts.gates import Gate, at_least_zero
from holdover.methods.parts.history import before
from holdover.methods.parts.predictors import Repeat
from holdover.methods.parts.signals import relative


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


@dataclass(frozen=True)
class OneForAllBlocks(Gate):
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
        assert call.held is not None
        if call.span.first > 0:
            first = call.peer(0)
            return Verdict(None if first and first.numbers.get("reused") else "led")
        reused = call.held.numbers["reused"]
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
        return max(1, math.floor(self.run * call.step.num_steps + 1e-9))

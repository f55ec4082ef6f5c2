"""DiCache, slowly: sum the change of the probe's output; stand in along the line through the last two residuals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.holdover.case import Case
from tests.holdover.naive.steps import TailTwin, change
from tests.holdover.toy import BLOCKS, MANY


class DiCache(TailTwin):
    def __init__(
        self,
        *,
        threshold: float = 0.08,
        probe: int = 1,
        gamma: Any = (1.0, 2.0),
        retain: Any = 0.2,
        last: bool = False,
        branches: Any = (),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.threshold, self.probe, self.retain, self.clamp = threshold, probe, retain, gamma
        self.computes_last, self.branches = last, branches

    def decide(self, x: Any, compute: Any) -> tuple[str, dict[str, float]]:
        memory, z = self.now["memory"], x.clone()
        reason, scores = self.forced(), {}
        if reason is None:
            scores = self.scores(z, self.now["entry"])
            reason = "reuse" if scores["drift"] < scores["threshold"] else "drift"
        memory["z"], memory["entry"] = z, self.now["entry"]
        memory["drift"] = scores["drift"] if reason == "reuse" else 0.0
        return reason, scores

    def scores(self, z: Any, entry: Any) -> dict[str, float]:
        memory = self.now["memory"]
        moved = change(z, memory["z"])
        return {"change": moved, "drift": memory["drift"] + moved, "threshold": self.threshold}

    def stand_in(self, x: Any) -> Any:
        entry, history = self.now["entry"], self.now["memory"]["history"]
        P1, R1 = history[-1]
        if len(history) == 1:
            return entry + R1
        P2, R2 = history[-2]
        return entry + (R2 + self.factor(x - entry, P1, P2) * (R1 - R2))

    def factor(self, P: Any, P1: Any, P2: Any) -> float:
        ratio = float((P - P2).abs().mean() / (P1 - P2).abs().mean())
        return min(max(ratio, self.clamp[0]), self.clamp[1])

    def learn(self, y: Any) -> None:
        entry = self.now["entry"]
        self.now["memory"].setdefault("history", []).append((self.now["x"] - entry, y - entry))


def case(**options: Any) -> Case:
    return Case("dicache", DiCache, options, MANY, {"blocks": BLOCKS})


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(threshold=0.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(threshold=0.3, probe=2, retain=1, protection="chunk"),
    case(threshold=0.2, gamma=(1.0, 1.5), retain=(0.1, 1), last=True),
    replace(case(threshold=0.2, retain=0.3, branches=("cond", "uncond")), branches=("cond", "uncond")),
]

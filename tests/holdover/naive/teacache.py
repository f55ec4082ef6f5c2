"""TeaCache, slowly: sum the mapped change of the modulated input from step to step; compute once it is enough."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.holdover.case import Case
from tests.holdover.naive.steps import TailTwin, change
from tests.holdover.toy import BLOCKS, MANY


class TeaCache(TailTwin):
    def __init__(
        self, *, threshold: float = 0.1, polynomial: Any = (), retain: Any = 1, last: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        self.threshold, self.polynomial, self.retain, self.computes_last = threshold, polynomial, retain, last

    def decide(self, x: Any, compute: Any) -> tuple[str, dict[str, float]]:
        memory, modulated = self.now["memory"], compute.modulated(x).clone()
        reason, scores = self.forced(), {}
        if reason is None:
            moved = change(modulated, memory["modulated"])
            memory["drift"] += np.polyval(self.polynomial, moved) if len(self.polynomial) else moved
            scores = {"change": moved, "drift": memory["drift"], "threshold": self.threshold}
            reason = "reuse" if memory["drift"] < self.threshold else "drift"
        memory["modulated"] = modulated
        if reason != "reuse":
            memory["drift"] = 0.0
        return reason, scores


def case(**options: Any) -> Case:
    return Case("teacache", TeaCache, options, MANY, {"blocks": BLOCKS})


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(threshold=0.0)
#: Every option away from its default, but for the tap: the toy declares one alone.
VARIED: list[Case] = [
    case(threshold=0.3, protection="chunk", polynomial=(2.0, 0.5, 0.001)),
    case(retain=(0.1, 1), last=False),
]

"""FlowCache, slowly: each chunk sums the change of its own input from step to step; compute once it is enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.holdover.case import Case
from tests.holdover.naive.steps import TailTwin, change
from tests.holdover.toy import BLOCKS, MANY, StaggeredLoop, ToyLoop


class FlowCache(TailTwin):
    """``memory`` is the chunk's own."""

    def __init__(self, *, threshold: float = 0.01, retain: Any = 0, **options: Any) -> None:
        super().__init__(**options)
        self.threshold, self.retain = threshold, retain

    def decide(self, x: Any, compute: Any) -> tuple[str, dict[str, float]]:
        memory, reason, scores = self.now["memory"], self.forced(), {}
        if reason is None:
            moved = change(x, memory["x"])
            memory["drift"] += moved
            scores = {"change": moved, "drift": memory["drift"], "threshold": self.threshold}
            reason = "reuse" if memory["drift"] < self.threshold else "drift"
        memory["x"] = x.clone()
        if reason != "reuse":
            memory["drift"] = 0.0
        return reason, scores


def case(**options: Any) -> Case:
    """FlowCache is for chunks in flight at staggered noise levels."""
    return Case("flowcache", FlowCache, options, MANY, {"blocks": BLOCKS}, loops=StaggeredLoop)


DEFAULT = case(threshold=0.1)  # of 0.01, the default, the toy moves more in any step
#: Options under which the trigger always computes.
CLOSED = case(threshold=0.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(threshold=0.3, retain=0.2, protection="chunk"),
    replace(case(threshold=0.2, retain=3), loops=ToyLoop),
]

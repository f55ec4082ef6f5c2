"""FlowCache, slowly: each chunk sums the change of its own input from step to step; compute once it is enough."""

from __future__ import annotations

from typing import Any

from tests.holdover.naive.steps import TailTwin, change


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

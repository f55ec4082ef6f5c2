"""FBCache, slowly: the first block's residual against that of the step at which the rest was last computed."""

from __future__ import annotations

from typing import Any

from tests.holdover.naive.steps import TailTwin, change


class FBCache(TailTwin):
    probe = 1

    def __init__(self, *, threshold: float = 0.05, **options: Any) -> None:
        super().__init__(**options)
        self.threshold = threshold

    def decide(self, x: Any, compute: Any) -> tuple[str, dict[str, float]]:
        memory, first = self.now["memory"], x - self.now["entry"]
        reason, scores = self.forced(), {}
        if reason is None:
            moved = change(first, memory["first"])
            scores = {"change": moved, "threshold": self.threshold}
            reason = "reuse" if moved < self.threshold else "change"
        if reason != "reuse":
            memory["first"] = first
        return reason, scores

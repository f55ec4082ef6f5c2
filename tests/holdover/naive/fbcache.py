"""FBCache, slowly: the first block's residual against that of the step at which the rest was last computed."""

from __future__ import annotations

from typing import Any

from tests.holdover.case import Case
from tests.holdover.naive.steps import TailTwin, change
from tests.holdover.toy import BLOCKS, MANY


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


def case(**options: Any) -> Case:
    return Case("fbcache", FBCache, options, MANY, {"blocks": BLOCKS})


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(threshold=0.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(threshold=0.2, protection="chunk"),
]

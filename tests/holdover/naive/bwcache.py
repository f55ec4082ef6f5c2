"""BWCache, slowly: outputs of all computed steps are listed; block 0 compares the latest two of every block."""

from __future__ import annotations

from typing import Any

from tests.holdover.case import Case
from tests.holdover.naive.steps import StepTwin, change
from tests.holdover.toy import BLOCKS, MANY


class BWCache(StepTwin):
    """``memory[block]`` lists the block's outputs; ``memory["run"]`` counts the repeats since the last of them."""

    def __init__(self, *, threshold: float = 0.15, run: Any = 0.1, retain: Any = 0, **options: Any) -> None:
        super().__init__(**options)
        self.threshold, self.run, self.retain = threshold, run, retain

    def block(self, number: int, x: Any, compute: Any) -> Any:
        now, memory = self.now, self.now["memory"]
        scores: dict[str, float] = {}
        if number == 0:
            now["forced"] = self.forced()
            now["reason"], scores = (now["forced"], {}) if now["forced"] else self.decide()
        reason = now["reason"]
        if reason == "reuse":
            memory["run"] += number == 0
            return self.note(number, reason, memory[number][-1].clone(), scores)
        memory["run"] = 0
        y = compute(x)
        memory.setdefault(number, []).append(y.clone())
        return self.note(number, reason if number == 0 or now["forced"] else "led", y, scores)

    def decide(self) -> tuple[str, dict[str, float]]:
        memory, steps = self.now["memory"], self.now["fields"]["num_steps"]
        run = self.run if isinstance(self.run, int) else max(1, int(self.run * steps + 1e-9))
        if memory["run"] > 0:
            return ("reuse" if memory["run"] < run else "stale"), {}
        if len(memory[0]) < 2:
            return "history", {}
        average = sum(change(*reversed(memory[block][-2:])) for block in range(self.blocks)) / self.blocks
        return ("reuse" if average < self.threshold else "change"), {"change": average, "threshold": self.threshold}


def case(**options: Any) -> Case:
    return Case("bwcache", BWCache, options, MANY, {"blocks": BLOCKS})


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(threshold=0.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(threshold=0.035, run=3, retain=0.2, protection="chunk"),
    case(run=0.2),
]

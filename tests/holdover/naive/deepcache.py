"""DeepCache, slowly: at fixed intervals remember what the last of the inner blocks gives; in between it gives that."""

from __future__ import annotations

from typing import Any

from tests.holdover.case import Case
from tests.holdover.naive.steps import StepTwin
from tests.holdover.toy import BLOCKS, MANY


class DeepCache(StepTwin):
    def __init__(self, *, every: int = 3, shallow: int = 1, retain: Any = 0, **options: Any) -> None:
        super().__init__(**options)
        self.every, self.retain = every, retain
        self.inner = range(shallow, self.blocks - shallow)

    def block(self, number: int, x: Any, compute: Any) -> Any:
        if number not in self.inner:
            return self.note(number, "shallow", compute(x))
        memory = self.now["memory"]
        if number == self.inner[0]:
            self.now["reason"] = self.decide()
        if self.now["reason"] == "reuse":
            return self.note(number, "reuse", memory["deep"].clone() if number == self.inner[-1] else x)
        y = compute(x)
        if number == self.inner[-1]:
            memory["deep"] = y.clone()
        return self.note(number, self.now["reason"], y)

    def decide(self) -> str:
        forced = self.forced()
        if forced in ("kv cycle", "retained"):
            return forced
        if self.now["fields"]["index"] % self.every == 0:
            return "interval"
        return forced or "reuse"


def case(**options: Any) -> Case:
    return Case("deepcache", DeepCache, options, MANY, {"blocks": BLOCKS})


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(retain=1.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(every=2, shallow=0, retain=3, protection="chunk"),
]

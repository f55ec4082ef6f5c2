"""EasyCache, slowly: sum the change that K foretells from step to step; compute once it is enough."""

from __future__ import annotations

from typing import Any

from tests.holdover.case import Case
from tests.holdover.naive.steps import TailTwin
from tests.holdover.toy import BLOCKS, MANY


class EasyCache(TailTwin):
    """``computed`` lists input and output of every computed step of the chunk, ``passed`` of every step."""

    computes_last = True

    def __init__(
        self,
        *,
        threshold: float = 0.025,
        size_of: str = "latest",
        one_decision: bool = False,
        retain: Any = 5,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.threshold, self.retain, self.size_of, self.one_decision = threshold, retain, size_of, one_decision
        self.first_branch: dict[Any, tuple[str, bool]] = {}

    def decide(self, x: Any, compute: Any) -> tuple[str, dict[str, float]]:
        fields = self.now["fields"]
        leader, led = self.first_branch.get((fields["chunk"], fields["index"]), (fields["branch"], None))
        if self.one_decision and leader != fields["branch"] and not led:
            return "branch", {}
        reason, scores = self.judge(x)
        if self.one_decision and leader != fields["branch"] and reason == "drift":
            reason = "reuse"
        self.first_branch.setdefault((fields["chunk"], fields["index"]), (fields["branch"], reason == "reuse"))
        return reason, scores

    def judge(self, x: Any) -> tuple[str, dict[str, float]]:
        memory = self.now["memory"]
        reason = self.forced()
        if reason is None and len(memory["computed"]) < 2:
            reason = "history"
        if reason is not None:
            return reason, {}
        (older_x, older_y), (newer_x, newer_y) = memory["computed"][-2:]
        k = mean(newer_y - older_y) / mean(newer_x - older_x)
        last_x, last_y = memory["passed"][-1]
        if self.size_of == "computed":
            last_y = newer_y
        change = k * mean(x - last_x) / mean(last_y)
        memory["sum"] += change
        scores = {"change": change, "drift": memory["sum"], "threshold": self.threshold}
        return "reuse" if memory["sum"] < self.threshold else "drift", scores

    def stand_in(self, x: Any) -> Any:
        memory = self.now["memory"]
        then_x, then_y = memory["computed"][-1]
        y = x + (then_y - then_x)
        memory["passed"].append((x.clone(), y.clone()))
        return y

    def learn(self, y: Any) -> None:
        memory, pair = self.now["memory"], (self.now["x"], y.clone())
        memory.setdefault("computed", []).append(pair)
        memory.setdefault("passed", []).append(pair)
        memory["sum"] = 0.0


def mean(value: Any) -> float:
    return float(value.abs().mean())


def case(**options: Any) -> Case:
    return Case("easycache", EasyCache, options, MANY, {"blocks": BLOCKS})


DEFAULT = case(threshold=0.06)  # of 0.025, the default, a step of the toy is on the very edge
#: Options under which the trigger always computes.
CLOSED = case(threshold=0.0)
#: Every option away from its default, but for the level of the model, whose input a twin is not shown: the replayed
#: records of the released code are of that level.
VARIED: list[Case] = [
    case(threshold=0.1, retain=2, protection="chunk"),
    case(retain=0),
    case(threshold=0.06, size_of="computed", one_decision=True, retain=(0.1, 1)),
]

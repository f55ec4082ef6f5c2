"""TaylorSeer, slowly: all outputs are kept, and the differences taken anew for every forecast."""

from __future__ import annotations

from typing import Any

from tests.holdover.case import Case
from tests.holdover.naive.steps import SublayerTwin
from tests.holdover.toy import BLOCKS, MANY


class TaylorSeer(SublayerTwin):
    """``memory[first]`` lists the computed steps of a group of slots, by its first, and what left its last slot."""

    def __init__(
        self, *, every: int = 5, start: int = 0, order: int = 1, span: str = "all", retain: Any = 0, **options: Any
    ) -> None:
        super().__init__(**options)
        self.every, self.start, self.order, self.span, self.retain = every, start, order, span, retain

    def runner(self, fields: dict[str, Any], run: Any) -> Any:
        """The whole model may be one block, number 0."""
        if self.span != "model":
            return super().runner(fields, run)
        return super().runner(fields, lambda apply: apply(0, None, lambda _: run()))

    def update(self, number: int, x: Any, compute: Any) -> Any:
        if self.span == "sublayer":
            return super().update(number, x, compute)
        return self.note(number, "kv update", compute(x))

    def block(self, number: int, x: Any, compute: Any) -> Any:
        if self.span == "sublayer":
            return super().block(number, x, compute)
        first, last = (0, self.blocks - 1) if self.span == "all" else (number, number)
        return self.slot(number, first, last, x, compute)

    def part(self, slot: int, kind: str, x: Any, compute: Any) -> Any:
        return self.slot(slot, slot, slot, x, compute)

    def slot(self, number: int, first: int, last: int, x: Any, compute: Any) -> Any:
        if number == first:
            self.now["reason"] = self.due(first)
        reason = self.now["reason"]
        history = self.now["memory"].setdefault(first, [])
        step = self.now["fields"]["index"]
        if reason == "reuse":
            return self.note(number, reason, forecast(history[-1 - self.order :], step) if number == first else x)
        y = compute(x)
        if number == last:
            history.append((step, y.clone()))
        return self.note(number, reason, y)

    def due(self, first: int) -> str:
        reason = self.forced()
        if reason in ("kv cycle", "retained"):
            return reason
        if self.now["fields"]["index"] in range(self.start, 1000, self.every):
            return "interval"
        if reason == "condition":
            return reason
        return "reuse" if self.now["memory"].get(first) else "first"


def forecast(history: list[Any], step: int) -> Any:
    """Newest last."""
    s0, y0 = history[-1]
    k = step - s0
    y = y0.clone()
    if len(history) > 1:
        s1, y1 = history[-2]
        slope = (y0 - y1) / (s0 - s1)
        y = y + slope * k
    if len(history) > 2:
        s2, y2 = history[-3]
        bend = (slope - (y1 - y2) / (s1 - s2)) / (s0 - s1)
        y = y + bend * (k * k / 2)
    return y


def case(**options: Any) -> Case:
    return Case("taylorseer", TaylorSeer, options, MANY, {"blocks": BLOCKS})


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(retain=1.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(every=3, order=2, span="block", retain=0.15, protection="chunk"),
    case(every=4, start=1, order=0, retain=2),
    case(every=4, order=2),
    case(every=3, order=2, span="sublayer", protection="chunk"),
    case(every=4, span="model", retain=(0.1, 1)),
]

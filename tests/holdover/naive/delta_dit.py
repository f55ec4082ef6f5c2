"""Δ-DiT, slowly: between full steps, what the rear half added stands in for it early, what the front added late."""

from __future__ import annotations

from typing import Any

from tests.holdover.case import Case
from tests.holdover.naive.steps import StepTwin
from tests.holdover.toy import BLOCKS, MANY


class DeltaDiT(StepTwin):
    """``memory["front"]`` and ``memory["rear"]`` are what each half added when it last ran."""

    def __init__(self, *, every: int = 4, early: float = 0.5, retain: Any = 0, **options: Any) -> None:
        super().__init__(**options)
        self.every, self.early, self.retain = every, early, retain

    def block(self, number: int, x: Any, compute: Any) -> Any:
        now, middle = self.now, self.blocks // 2
        half = "front" if number < middle else "rear"
        if number in (0, middle):
            now["entered"], now["reason"] = x.clone(), self.why(half)
        if now["reason"] == "reuse":
            return self.note(number, "reuse", x + now["memory"][half] if number in (0, middle) else x)
        y = compute(x)
        if number in (middle - 1, self.blocks - 1):
            now["memory"][half] = y - now["entered"]
        return self.note(number, now["reason"], y)

    def why(self, half: str) -> str:
        step, steps = self.now["fields"]["index"], self.now["fields"]["num_steps"]
        forced = self.forced()
        if forced in ("kv cycle", "retained"):
            return forced
        held_over = "rear" if step < int(steps * self.early + 1e-9) else "front"
        if half != held_over:
            return "half"
        if step % self.every == 0:
            return "interval"
        if forced == "condition":
            return forced
        return "reuse" if half in self.now["memory"] else "first"


def case(**options: Any) -> Case:
    return Case("delta_dit", DeltaDiT, options, MANY, {"blocks": BLOCKS})


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(retain=1.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(every=3, early=0.3, retain=2, protection="chunk"),
]

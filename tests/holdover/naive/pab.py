"""PAB, slowly: every attention module counts the steps for itself."""

from __future__ import annotations

from typing import Any

from tests.holdover.case import Case
from tests.holdover.naive.steps import SublayerTwin
from tests.holdover.toy import BLOCKS, MANY


class PAB(SublayerTwin):
    """``memory[slot]`` is what the slot last gave."""

    def __init__(
        self,
        *,
        spatial: int = 2,
        temporal: int = 4,
        cross: int = 6,
        start: float = 0.15,
        stop: float = 0.85,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.every = {"spatial": spatial, "temporal": temporal, "cross": cross}
        self.start, self.stop = start, stop

    def part(self, slot: int, kind: str, x: Any, compute: Any) -> Any:
        memory, reason = self.now["memory"], self.decide(kind)
        if reason != "reuse":
            memory[slot] = compute(x).clone()
        return self.note(slot, reason, memory[slot].clone())

    def decide(self, kind: str) -> str:
        forced, index, steps = self.forced(), self.now["fields"]["index"], self.now["fields"]["num_steps"]
        if forced == "kv cycle":
            return forced
        if index < int(self.start * steps + 1e-9) or index >= int(self.stop * steps + 1e-9):
            return "retained"
        if kind not in self.every:
            return "kind"
        if index % self.every[kind] == 0:
            return "interval"
        return "condition" if forced == "condition" else "reuse"


def case(**options: Any) -> Case:
    return Case("pab", PAB, options, MANY, {"blocks": BLOCKS})


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(start=1.0, stop=1.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(spatial=1, temporal=3, cross=2, start=0.3, stop=1.0, protection="chunk"),
    case(start=0.0),
]

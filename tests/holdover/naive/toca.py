"""ToCa, slowly: one token at a time."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.holdover.case import Case
from tests.holdover.naive.steps import SublayerTwin
from tests.holdover.toy import BLOCKS, MANY


class ToCa(SublayerTwin):
    """``memory[slot]`` lists, per token, what the slot last gave for it and how many steps ago."""

    def __init__(
        self, *, every: int = 4, fresh: float = 0.07, age: float = 0.25, retain: Any = 0, **options: Any
    ) -> None:
        super().__init__(**options)
        self.every, self.fresh, self.age, self.retain = every, fresh, age, retain

    def part(self, slot: int, kind: str, x: Any, compute: Any) -> Any:
        memory, reason = self.now["memory"], self.decide()
        if reason != "reuse":
            y = compute(x)
            memory[slot] = [[token.clone(), 0] for token in y[0]]
            return self.note(slot, reason, y)
        tokens, scores = memory[slot], {}
        for token in tokens:
            token[1] += 1
        if kind == "mlp":
            norms = [math.hypot(*y.tolist()) for y, _ in tokens]
            largest = max(norms)
            score = [n / largest + self.age * steps / self.every for n, (_, steps) in zip(norms, tokens, strict=True)]
            count = next(n for n in range(len(tokens) + 1) if n >= self.fresh * len(tokens) - 1e-9)
            chosen = sorted(range(len(tokens)), key=lambda i: -score[i])[:count]
            for i, y in zip(chosen, compute(x[:, chosen])[0], strict=True):
                tokens[i] = [y, 0]
            scores = {"recomputed": count / len(tokens)}
        return self.note(slot, reason, torch.stack([y for y, _ in tokens])[None], scores)

    def decide(self) -> str:
        forced = self.forced()
        if forced in ("kv cycle", "retained"):
            return forced
        if self.now["fields"]["index"] % self.every == 0:
            return "interval"
        return "condition" if forced == "condition" else "reuse"


def case(**options: Any) -> Case:
    return Case("toca", ToCa, options, MANY, {"blocks": BLOCKS}, tolerance=1e-5)


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(retain=1.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(every=3, fresh=0.3, age=2.0, retain=0.2, protection="chunk"),
    case(every=6, fresh=0.02, age=0.0),
]

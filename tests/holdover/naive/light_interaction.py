"""Light Interaction, slowly: ask how familiar the chunk is; if enough, say again what the first step said."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from holdover.step import Step
from tests.holdover.case import Case
from tests.holdover.naive.steps import StepTwin
from tests.holdover.toy import BLOCKS, MANY


class LightInteraction(StepTwin):
    """``memory["outputs"]`` are those of the computed passes of the chunk."""

    computes_last = True

    def __init__(self, *, familiar: Any, threshold: float = 0.7, **options: Any) -> None:
        super().__init__(**options)
        self.familiar, self.threshold = familiar, threshold

    def runner(self, fields: dict[str, Any], run: Any) -> Any:
        """The whole model is one block, number 0."""
        return super().runner(fields, lambda apply: apply(0, None, lambda _: run()))

    def block(self, number: int, x: Any, compute: Any) -> Any:
        fields, memory = self.now["fields"], self.now["memory"]
        reason, scores = self.forced(), {}
        if reason is None:
            score = self.familiar(Step(**{**fields, "index": 0}))
            scores = {"familiar": score, "threshold": self.threshold}
            reason = "reuse" if score >= self.threshold else "unfamiliar"
        y = memory["outputs"][0].clone() if reason == "reuse" else compute(x)
        if reason != "reuse":
            memory.setdefault("outputs", []).append(y.clone())
        return self.note(number, reason, y, scores)


def overlap(
    q: Any, h: Any, *, radius: float = 8.0, view: tuple[float, float] = (60.0, 35.0), points: int = 4000
) -> float:
    """Of points around q that q sees, the share that h sees, one point at a time; poses are lists of rows."""
    drawn, seen, both = random.Random(1), 0, 0
    turn = [[sum(q[k][i] * h[k][j] for k in range(3)) for j in range(3)] for i in range(3)]  # h's axes in q's
    place = [sum(q[k][i] * (h[k][3] - q[k][3]) for k in range(3)) for i in range(3)]
    while seen < points:
        p = [drawn.uniform(-radius, radius) for _ in range(3)]
        if math.dist(p, (0, 0, 0)) > radius or not sees(p, [0, 0, 1], view):
            continue
        seen += 1
        apart = [a - b for a, b in zip(p, place, strict=True)]
        both += math.hypot(*apart) < radius and sees(apart, [row[2] for row in turn], view)
    return both / seen


def sees(point: Any, axis: Any, view: tuple[float, float]) -> bool:
    angles = [
        (math.degrees(math.atan2(x, z)), math.degrees(math.atan2(y, math.hypot(x, z)))) for x, y, z in (point, axis)
    ]
    turned = abs(angles[0][0] - angles[1][0]) % 360
    return min(turned, 360 - turned) < view[0] / 2 and abs(angles[0][1] - angles[1][1]) < view[1] / 2


@dataclass(frozen=True)
class SomeChunks:
    """Most chunks are familiar, the more so in the first guidance branch."""

    def __call__(self, step: Step) -> float:
        assert step.index == 0
        return (0.9, 0.75, 0.2)[step.chunk % 3] - 0.1 * (step.branch == "uncond")


def case(**options: Any) -> Case:
    return Case("light_interaction", LightInteraction, {"familiar": SomeChunks(), **options}, MANY, {"blocks": BLOCKS})


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(threshold=1.0)
#: Every option away from its default.
VARIED: list[Case] = [case(threshold=0.1), case(threshold=0.8, protection="chunk")]

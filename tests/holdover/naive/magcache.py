"""MagCache, slowly: the errors of all steps since the residual was computed are added up anew for every step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

from tests.holdover.case import Case
from tests.holdover.naive.steps import TailTwin
from tests.holdover.toy import BLOCKS, MANY


class MagCache(TailTwin):
    def __init__(
        self, *, ratios: Any, threshold: float = 0.06, max_skips: int = 3, retain: Any = 0.2, **options: Any
    ) -> None:
        super().__init__(**options)
        self.ratios, self.threshold, self.max_skips, self.retain = ratios, threshold, max_skips, retain
        self.branches = list(ratios) if isinstance(ratios, dict) else ()

    def decide(self, x: Any, compute: Any) -> tuple[str, dict[str, float]]:
        step, reason = self.now["fields"]["index"], self.forced()
        ratios = self.ratios[self.now["fields"]["branch"]] if isinstance(self.ratios, dict) else self.ratios
        if reason is not None:
            return reason, {}
        since = self.now["memory"]["step"]
        error = sum(abs(1 - prod(ratios[since + 1 : later + 1])) for later in range(since + 1, step + 1))
        scores = {"drift": error, "threshold": self.threshold}
        if error >= self.threshold:
            return "drift", scores
        return ("stale" if step - since > self.max_skips else "reuse"), scores

    def learn(self, y: Any) -> None:
        super().learn(y)
        self.now["memory"]["step"] = self.now["fields"]["index"]


def measured(residuals: list[Any]) -> list[float]:
    """The ratios that a calibration run is to give, from the residuals of one chunk."""
    ratios = [1.0]
    for then, now in pairwise(residuals):
        tokens = zip(then.reshape(-1, then.shape[-1]), now.reshape(-1, now.shape[-1]), strict=True)
        each = [float((b**2).sum() ** 0.5 / (a**2).sum() ** 0.5) for a, b in tokens]
        ratios.append(sum(each) / len(each))
    return ratios


def case(**options: Any) -> Case:
    return Case("magcache", MagCache, options, MANY, {"blocks": BLOCKS})


#: What calibration gives for a model that keeps to MagCache's law: ratios fall slowly, at the end steeply.
RATIOS = tuple(1 - 0.008 - 0.1 * (n / 23) ** 8 for n in range(24))


DEFAULT = case(ratios=RATIOS)
#: Options under which the trigger always computes.
CLOSED = case(ratios=RATIOS, threshold=0.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(ratios=RATIOS, threshold=0.2, max_skips=2, retain=1, protection="chunk"),
    case(ratios=(1.02,) * 24, max_skips=9),
    replace(case(ratios={"cond": RATIOS, "uncond": (0.98,) * 24}, retain=0.3), branches=("cond", "uncond")),
]

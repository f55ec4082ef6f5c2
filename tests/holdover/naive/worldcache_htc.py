"""WorldCache-HTC, slowly: the whole model's output, one token at a time."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np

from tests.holdover.case import Case
from tests.holdover.naive.steps import StepTwin
from tests.holdover.toy import BLOCKS, MANY


class WorldCacheHTC(StepTwin):
    computes_last = True

    def __init__(
        self,
        *,
        stable: float = 0.30,
        chaotic: float = 0.60,
        n_max: int = 2,
        eta: float | None = None,
        drift_reduction: str = "chaotic",
        retain: Any = 10,
        relative_epsilon: float = 0.0,
        pinned: Any = 0,
        modalities: Any = (),
        channels: int = -1,
        patch: Any = (),
        modality_channels: Any = (),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.p_s, self.p_c, self.n_max, self.retain = stable, chaotic, n_max, retain
        self.eta = {"chaotic": 0.2 / (1 - chaotic), "all": 0.2}[drift_reduction] if eta is None else eta
        self.channels, self.patch, self.widths = channels, patch, modality_channels
        self.reduction, self.relative, self.modalities = drift_reduction, relative_epsilon, modalities
        self.pinned = range(pinned) if isinstance(pinned, int) else pinned
        self.first_branch: dict[Any, bool] = {}

    def runner(self, fields: dict[str, Any], run: Any) -> Any:
        """The whole model is one block, number 0."""
        return super().runner(fields, lambda apply: apply(0, None, lambda _: run()))

    def block(self, number: int, x: Any, compute: Any) -> Any:
        fields, memory = self.now["fields"], self.now["memory"]
        step, scores = fields["index"], {}
        led = self.first_branch.get((fields["chunk"], step))
        reason = "branch" if led is False else self.forced()
        if reason in (None, "condition") and memory and len(memory["outputs"]) < 3:
            reason = "history"
        if reason is None:
            scores = {"drift": memory["drift"], "threshold": self.eta}
            reason = "reuse" if led else self.decide(step)
        self.first_branch.setdefault((fields["chunk"], step), reason == "reuse")
        if reason == "reuse":
            y = self.predict(step)
            memory["drift"] += self.drift(y, memory["shown"])
        else:
            y = compute(None)
            memory.setdefault("outputs", []).append((step, y.clone()))
            memory["drift"] = 0.0
            if len(memory["outputs"]) >= 3:
                self.regroup()
        memory["shown"] = y.clone()
        return self.note(number, reason, y, scores)

    def decide(self, step: int) -> str:
        memory = self.now["memory"]
        if math.isnan(memory["drift"]):
            return "nan"
        if memory["drift"] >= self.eta:
            return "drift"
        return "stale" if step - memory["outputs"][-1][0] > self.n_max else "reuse"

    def tokens(self, y: Any) -> list[Any]:
        """Views into an output, one per token."""
        last = y.movedim(self.channels, -1)
        patch = self.patch or (1,) * (last.dim() - 2)
        corners = list(product(*(range(0, n, p) for n, p in zip(last.shape[1:-1], patch, strict=True))))
        views = []
        for row in last:
            first = 0
            for width in self.widths or (last.shape[-1],):
                for corner in corners:
                    place = tuple(slice(at, at + p) for at, p in zip(corner, patch, strict=True))
                    views.append(row[place][..., first : first + width])
                first += width
        return views

    def regroup(self) -> None:
        """Curvature and group of every token, from the last three outputs."""
        memory = self.now["memory"]
        (s2, y2), (s1, y1), (s0, y0) = memory["outputs"][-3:]
        paths = list(zip(self.tokens(y0), self.tokens(y1), self.tokens(y2), strict=True))
        v0 = [((a - b) / (s0 - s1)).numpy() for a, b, _ in paths]
        v1 = [((b - c) / (s1 - s2)).numpy() for _, b, c in paths]
        free = [i for i in range(len(paths)) if i not in self.pinned]
        epsilon = 1e-8 + self.relative * np.mean([np.linalg.norm(v0[i]) ** 2 for i in free])
        kappa = [
            np.linalg.norm((new - old) / (s0 - s1)) / (np.linalg.norm(new) ** 2 + epsilon)
            for new, old in zip(v0, v1, strict=True)
        ]
        group = ["pinned"] * len(paths)
        start = 0
        for count in self.modalities or [len(paths)]:
            own = [i for i in free if start <= i < start + count]
            start += count
            if own:
                low, high = np.quantile([kappa[i] for i in own], [self.p_s, self.p_c])
                for i in own:
                    group[i] = "stable" if kappa[i] < low else "chaotic" if kappa[i] >= high else "linear"
        memory["kappa"], memory["group"], memory["free"] = kappa, group, free

    def predict(self, step: int) -> Any:
        memory = self.now["memory"]
        (s2, y2), (s1, y1), (s0, y0) = memory["outputs"][-3:]
        k = step - s0
        x = min(k / self.n_max, 1)
        alpha = 3 * x**2 - 2 * x**3
        y = y0.clone()
        tokens = zip(*map(self.tokens, (y, y0, y1, y2)), memory["group"], strict=True)
        for token, a, b, c, group in tokens:
            v0, v1 = (a - b) / (s0 - s1), (b - c) / (s1 - s2)
            if group == "linear":
                token.copy_(a + k * v0)
            elif group == "chaotic":
                token.copy_(a + k * ((1 - alpha) * v0 + alpha * v1))
        return y

    def drift(self, now: Any, before: Any) -> float:
        memory = self.now["memory"]
        moved = [float((a - b).norm()) for a, b in zip(self.tokens(now), self.tokens(before), strict=True)]
        chaotic = [i for i, group in enumerate(memory["group"]) if group == "chaotic"]
        total = sum(memory["kappa"][i] * moved[i] for i in chaotic)
        return float(total / len(chaotic if self.reduction == "chaotic" else memory["free"]))


def case(**options: Any) -> Case:
    return Case("worldcache_htc", WorldCacheHTC, options, MANY, {"blocks": BLOCKS})


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(eta=0.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(chaotic=0.7, n_max=6, eta=3.33, retain=5),
    case(drift_reduction="all", retain=0, stable=0.2, protection="chunk"),
    case(n_max=5, retain=0.2, relative_epsilon=0.1, pinned=48, modalities=(96, 96)),
    case(eta=0.02, pinned=(0, 7, 100)),
    case(chaotic=0.8, patch=(2,), modality_channels=(2, 4), modalities=(96, 96)),
    case(channels=1, patch=(2,), n_max=4),
]

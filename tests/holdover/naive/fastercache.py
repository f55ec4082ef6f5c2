"""FasterCache's branch reuse, slowly: picture by picture, frequency by frequency."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.holdover.case import Case
from tests.holdover.naive.steps import StepTwin
from tests.holdover.toy import BLOCKS, GROUPS, MANY


class FasterCache(StepTwin):
    def __init__(
        self,
        *,
        every: int = 5,
        branch: str = "uncond",
        guide: str = "cond",
        low: float = 1.1,
        high: float = 1.1,
        switch: float = 0.5,
        retain: Any = 1 / 3,
        grids: Any = (),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.every, self.branch, self.guide, self.retain = every, branch, guide, retain
        self.low, self.high, self.switch, self.grids = low, high, switch, grids

    def runner(self, fields: dict[str, Any], run: Any) -> Any:
        """The whole model is one block, number 0."""
        return super().runner(fields, lambda apply: apply(0, None, lambda _: run()))

    def block(self, number: int, x: Any, compute: Any) -> Any:
        fields, memory = self.now["fields"], self.now["memory"]
        guide = self.memory.get((self.guide, fields["chunk"]), {})
        has_guide = fields["branch"] == self.branch and guide.get("step") == fields["index"]
        reason = self.decide(guide if has_guide else None)
        if reason == "reuse":
            return self.note(number, reason, self.predict(guide["output"], memory["difference"]))
        y = compute(None)
        memory.clear()
        memory.update(step=fields["index"], output=y.clone())
        if has_guide:
            memory["difference"] = y - guide["output"]
            memory["guide's changes"] = self.changes.get(self.guide, 0)
        return self.note(number, reason, y)

    def decide(self, guide: Any) -> str:
        memory, forced = self.now["memory"], self.forced()
        if forced in ("kv cycle", "retained"):
            return forced
        if guide is None:
            return "guide"
        if memory and "difference" not in memory:
            return "history"
        if memory and memory["guide's changes"] != self.changes.get(self.guide, 0):
            return "condition"
        if self.now["fields"]["index"] % self.every == 0:
            return "interval"
        return forced or "reuse"

    def predict(self, output: Any, difference: Any) -> Any:
        fields = self.now["fields"]
        first_part = fields["index"] < int(self.switch * fields["num_steps"] + 1e-9)
        low, high = (self.low, 1.0) if first_part else (1.0, self.high)
        weighted = np.empty(difference.shape)
        for b, sample in enumerate(difference.numpy()):
            if not self.grids:
                weighted[b] = self.weight(sample, low, high)
                continue
            start = 0
            while start < len(sample):
                for views, h, w in ((g.views, g.height, g.width) for g in self.grids):
                    for _ in range(views):
                        picture = sample[start : start + h * w]
                        for c in range(picture.shape[1]):
                            plane = self.weight(picture[:, c].reshape(h, w), low, high)
                            weighted[b, start : start + h * w, c] = plane.reshape(-1)
                        start += h * w
        return output + torch.from_numpy(weighted).to(output.dtype)

    def weight(self, picture: Any, low: float, high: float) -> Any:
        h, w = picture.shape
        spectrum = np.fft.fft2(picture)
        for i in range(h):
            for j in range(w):
                # Frequencies past the middle are negative ones.
                down, across = min(i, h - i), min(j, w - j)
                spectrum[i, j] *= low if down**2 + across**2 <= (min(h, w) // 5) ** 2 else high
        return np.fft.ifft2(spectrum).real


def case(**options: Any) -> Case:
    options["grids"] = GROUPS
    branches = ("cond", "uncond")
    return Case("fastercache", FasterCache, options, MANY, {"blocks": BLOCKS}, branches=branches, tolerance=1e-5)


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(retain=1.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(every=3, low=0.8, high=1.5, switch=0.7, retain=2, protection="chunk"),
    replace(case(every=2, branch="a", guide="b"), branches=("b", "a")),
]

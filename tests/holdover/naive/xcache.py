"""X-Cache (arXiv 2604.20289) once more, slowly and without an engine: one slot at a time, in float64 and Python loops.

``groups`` are (views, height, width); tokens are ordered frame, group, view, row, column.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tests.holdover.case import TOY_GROUPS, Case
from tests.holdover.toy import BLOCKS, PlannedLoop

EPSILON = 1e-8


def axis_counts(dims: tuple[int, int, int], K: int) -> list[int]:
    total = dims[0] * dims[1] * dims[2]
    if total <= K:
        return list(dims)
    k = [int(np.clip(np.round(dim * (K / total) ** (1 / 3)), 1, dim)) for dim in dims]
    while np.prod(k) > K:
        largest = int(np.argmax(k))  # the first of equals
        k[largest] -= 1
    return k


def axis_indices(dim: int, k: int) -> list[int]:
    return [int(i) for i in np.round(np.linspace(0, dim - 1, k))]


def spatial_entries(x: Any, groups: list[tuple[int, int, int]], K: int) -> list[np.ndarray]:
    """Per group, the chosen tokens of ``x [L, C]``, flattened."""
    per_frame = sum(v * h * w for v, h, w in groups)
    frames = len(x) // per_frame
    entries, before = [], 0
    for views, height, width in groups:
        kF, kH, kW = axis_counts((frames, height, width), K)
        chosen = []
        for view in range(views):
            for f in axis_indices(frames, kF):
                for h in axis_indices(height, kH):
                    for w in axis_indices(width, kW):
                        chosen.append(x[f * per_frame + before + view * height * width + h * width + w])
        entries.append(np.concatenate(chosen))
        before += views * height * width
    return entries


def global_entries(x: Any, groups: list[tuple[int, int, int]]) -> list[np.ndarray]:
    """Per group, the mean over its tokens in all frames and views."""
    per_frame = sum(v * h * w for v, h, w in groups)
    frames = len(x) // per_frame
    entries, before = [], 0
    for views, height, width in groups:
        size = views * height * width
        tokens = [x[f * per_frame + before + i] for f in range(frames) for i in range(size)]
        entries.append(np.mean(tokens, axis=0))
        before += size
    return entries


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    if norm_a == 0 and norm_b == 0:
        return 1.0
    if norm_a == 0 or norm_b == 0:
        return 0.0
    return float(a @ b / (norm_a * norm_b))


def told(fields: dict[str, Any]) -> list[Any]:
    """What each frame is told, or else the chunk's action alone."""
    return list(fields["frame_actions"]) if fields.get("frame_actions") is not None else [fields["action"]]


def deviation(now: list[np.ndarray], then: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max() / (np.abs(b).mean() + EPSILON)) for a, b in zip(now, then, strict=True))


class XCache:
    """One stream. The keys of every dictionary are slots, (branch, pass, block)."""

    def __init__(
        self,
        *,
        blocks: int,
        groups: list[tuple[int, int, int]],
        front_anchors: int = 1,
        back_anchors: int = 0,
        warmup: int = 1,
        tau_floor: float = 0.97,
        margin: float = 0.02,
        alpha: float = 0.30,
        tau_dev: float = 2.0,
        max_staleness: int | None = None,
        protection: str = "chunk",
        step0: str = "off",
        tokens: int = 32,
    ) -> None:
        self.B, self.groups, self.K = blocks, groups, tokens
        self.front, self.back, self.warmup = front_anchors, back_anchors, warmup
        self.floor, self.m, self.alpha, self.tau_dev = tau_floor, margin, alpha, tau_dev
        self.M, self.protection, self.step0 = max_staleness, protection, step0
        self.residual: dict[Any, Any] = {}
        self.spatial: dict[Any, Any] = {}
        self.mean: dict[Any, Any] = {}
        self.told: dict[Any, Any] = {}
        self.chunk: dict[Any, int] = {}
        self.running: dict[Any, float] = {}
        self.chunks: list[int] = []
        self.condition: dict[str, Any] = {}
        self.renewed: set[Any] = set()
        self.decisions: list[dict[str, Any]] = []

    def runner(self, fields: dict[str, Any], run: Any) -> Any:
        if fields.get("role") == "kv_update":
            return run(apply=lambda block, x, compute: self.note(block, "kv update", {}, compute(x)))
        chunk, branch = fields["chunk"], fields["branch"]
        if chunk not in self.chunks:
            self.chunks.append(chunk)
        if self.condition.setdefault(branch, fields["condition"]) != fields["condition"]:
            self.condition[branch] = fields["condition"]
            self.renewed.add((chunk, branch))

        def apply(block: int, x: Any, compute: Any) -> Any:
            slot = (branch, fields["index"], block)
            numbers = x[0].double().numpy()
            spatial, mean = spatial_entries(numbers, self.groups, self.K), global_entries(numbers, self.groups)
            reason, scores = self.forced(slot, fields), {}
            if reason is None:
                reason, scores = self.compare(slot, fields, spatial, mean)
            if reason == "reuse":
                return self.note(block, reason, scores, x + self.residual[slot])
            y = compute(x)
            self.residual[slot], self.spatial[slot], self.mean[slot] = y - x, spatial, mean
            self.told[slot], self.chunk[slot] = told(fields), self.chunks.index(chunk)
            return self.note(block, reason, scores, y)

        return run(apply=apply)

    def forced(self, slot: Any, fields: dict[str, Any]) -> str | None:
        branch, t, block = slot
        now = self.chunks.index(fields["chunk"])
        if now < self.warmup:
            return "warm-up"
        if self.protection == "chunk" and fields["commits"]:
            return "kv cycle"
        if block < self.front or block >= self.B - self.back:
            return "anchor"
        if self.step0 == "full" and t == 0:
            return "step 0"
        if self.M is not None and slot in self.chunk and now - self.chunk[slot] > self.M:
            return "stale"
        if (fields["chunk"], branch) in self.renewed:
            return "condition"
        return None if slot in self.residual else "first"

    def entries_cosine(self, slot: Any, fields: dict[str, Any], spatial: Any, mean: Any) -> float:
        cosines = [cosine(a, b) for a, b in zip(spatial, self.spatial[slot], strict=True)]
        cosines += [cosine(a, b) for a, b in zip(mean, self.mean[slot], strict=True)]
        return min([*cosines, *(cosine(a, b) for a, b in zip(told(fields), self.told[slot], strict=True))])

    def compare(self, slot: Any, fields: dict[str, Any], spatial: Any, mean: Any) -> tuple[str, dict[str, float]]:
        s = self.entries_cosine(slot, fields, spatial, mean)
        d = deviation(spatial, self.spatial[slot])
        if slot not in self.running:
            self.running[slot] = s
        self.running[slot] = self.alpha * s + (1 - self.alpha) * self.running[slot]
        tau = max(self.floor, self.running[slot] - self.m)
        if self.step0 == "relaxed" and slot[1] == 0:
            tau = 0.999
        scores = {"cosine": s, "threshold": tau, "deviation": d}
        if s >= tau and d < self.tau_dev:
            return "reuse", scores
        return ("cosine" if s < tau else "deviation"), scores

    def note(self, block: int, reason: str, scores: dict[str, float], y: Any) -> Any:
        self.decisions.append({"block": block, "computed": reason != "reuse", "reason": reason, "scores": scores})
        return y


def case(**options: Any) -> Case:
    return Case("xcache", XCache, options, known={"blocks": BLOCKS, "groups": TOY_GROUPS}, tolerance=1e-5)


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(tau_floor=1.5)
#: Every option away from its default.
VARIED: list[Case] = [
    case(front_anchors=2, back_anchors=1, warmup=3),
    case(front_anchors=0, warmup=0, protection="pass", max_staleness=2),
    case(tau_floor=0.9, margin=0.00015),
    case(tau_dev=0.22, alpha=1.0),
    case(step0="full", tokens=5),
    case(step0="relaxed", tokens=200, tau_floor=0.9),
    case(max_staleness=1),
    replace(case(margin=0.03), loops=PlannedLoop),
]

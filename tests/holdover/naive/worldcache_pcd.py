"""WorldCache-PCD, slowly: DiCache with a weighted drift, a threshold that moves, and a fitted factor.

``groups`` are (views, height, width); tokens are ordered frame, group, view, row, column.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tests.holdover.case import TOY_GROUPS, Case
from tests.holdover.naive.dicache import DiCache
from tests.holdover.naive.steps import change
from tests.holdover.toy import BLOCKS, MANY


class WorldCachePCD(DiCache):
    def __init__(
        self,
        *,
        groups: list[tuple[int, int, int]],
        probe: int = 2,
        swd: bool = True,
        beta_s: float = 0.12,
        saliency: str = "variance",
        cfc: bool = True,
        alpha: float = 2.0,
        ats: bool = True,
        beta_d: Any = 4.0,
        ofa: bool = True,
        gamma: tuple[float, float] = (0.0, 2.0),
        **options: Any,
    ) -> None:
        super().__init__(probe=probe, gamma=gamma if ofa else (1.0, 2.0), **options)
        self.per_frame = sum(v * h * w for v, h, w in groups)
        self.swd, self.beta_s, self.saliency, self.cfc, self.alpha = swd, beta_s, saliency, cfc, alpha
        self.ats, self.beta_d, self.ofa = ats, beta_d, ofa

    def scores(self, z: Any, entry: Any) -> dict[str, float]:
        memory = self.now["memory"]
        moved = self.weighted(z, memory["z"]) if self.swd else change(z, memory["z"])
        threshold, scores = self.threshold, {"change": moved}
        if self.swd or self.cfc:
            scores["motion"] = change(entry, memory["entry"])
        if self.cfc:
            threshold /= 1 + self.alpha * scores["motion"]
        if self.ats:
            number, passes = self.counted()
            u = passes / 35
            beta = u**2 / 6 + u / 2 + 10 / 3 if self.beta_d == "code" else self.beta_d
            threshold *= 1 + beta * number / passes
        return {**scores, "drift": memory["drift"] + moved, "threshold": threshold}

    def weighted(self, z: Any, z_prev: Any) -> float:
        """One place of the grid at a time."""
        places = z.shape[1] if self.saliency == "token deviation" else self.per_frame
        now, then = (value.double().numpy().reshape(-1, places, value.shape[-1]) for value in (z, z_prev))
        if self.saliency == "variance":
            saliency = [np.mean([np.var(token) for token in now[:, place]]) for place in range(places)]
        else:
            saliency = [np.std(then[:, place], ddof=1) for place in range(places)]
        low, high = min(saliency), max(saliency)
        drift = [
            np.mean([np.abs(a - b).mean() for a, b in zip(now[:, place], then[:, place], strict=True)])
            * (1 + self.beta_s * (saliency[place] - low) / (high - low))
            for place in range(places)
        ]
        return float(np.mean(drift) / np.abs(then).mean())

    def factor(self, P: Any, P1: Any, P2: Any) -> float:
        if not self.ofa:
            return super().factor(P, P1, P2)
        fitted = float(((P - P2) * (P1 - P2)).sum() / (((P1 - P2) ** 2).sum() + 1e-6))
        return min(max(fitted, self.clamp[0]), self.clamp[1])


def flow(then: Any, now: Any, window: int = 5, damping: float = 1e-2) -> np.ndarray[Any, Any]:
    """Lucas and Kanade for one picture ``[H, W]``, place by place: where each place of ``now`` was in ``then``."""
    height, width = then.shape
    h, w = (height + 1) // 2, (width + 1) // 2

    def half(picture: Any, i: int, j: int) -> float:
        i, j = min(max(i, 0), h - 1), min(max(j, 0), w - 1)
        return float(np.mean(picture[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]))

    def gradient(i: int, j: int) -> Any:
        down = half(then, i + 1, j) - half(then, i - 1, j)
        right = half(then, i, j + 1) - half(then, i, j - 1)
        return np.array([down / 2, right / 2])

    energy = np.mean([gradient(i, j) @ gradient(i, j) for i in range(h) for j in range(w)])
    solved = np.zeros((h, w, 2))
    for i in range(h):
        for j in range(w):
            A, b = damping * energy * np.eye(2) + 1e-37 * np.eye(2), np.zeros(2)
            for m in range(i - window // 2, i + window // 2 + 1):
                for n in range(j - window // 2, j + window // 2 + 1):
                    if 0 <= m < h and 0 <= n < w:
                        g = gradient(m, n)
                        A += np.outer(g, g) / window**2
                        b += g * (half(now, m, n) - half(then, m, n)) / window**2
            solved[i, j] = np.linalg.solve(A, b)
    full = np.zeros((height, width, 2))
    for i in range(height):
        for j in range(width):
            # The middle of place i lies at (i + ½)·h/height - ½ of the half-size grid.
            full[i, j] = 2 * bilinear(solved, (i + 0.5) * h / height - 0.5, (j + 0.5) * w / width - 0.5)
    return full


def bilinear(x: Any, row: float, column: float) -> Any:
    """``x [H, W, C]`` between its places, from the border outside."""
    row, column = min(max(row, 0), x.shape[0] - 1), min(max(column, 0), x.shape[1] - 1)
    i, j = int(row), int(column)
    i1, j1 = min(i + 1, x.shape[0] - 1), min(j + 1, x.shape[1] - 1)
    top = (1 - (column - j)) * x[i, j] + (column - j) * x[i, j1]
    bottom = (1 - (column - j)) * x[i1, j] + (column - j) * x[i1, j1]
    return (1 - (row - i)) * top + (row - i) * bottom


def case(**options: Any) -> Case:
    return Case("worldcache_pcd", WorldCachePCD, options, MANY, {"blocks": BLOCKS, "groups": TOY_GROUPS})


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(threshold=0.0)
#: Every option away from its default.
VARIED: list[Case] = [
    case(threshold=0.2, probe=1, beta_s=0.5, alpha=0.5, beta_d="code", gamma=(0.2, 1.8), retain=1, last=True),
    case(threshold=0.3, swd=False, ats=False, retain=0.1, protection="chunk"),
    case(probe=1, swd=False, cfc=False, ats=False, ofa=False),
    case(cfc=False, ofa=False),
    case(threshold=0.2, beta_s=5.0, saliency="token deviation"),
    replace(
        case(beta_s=1.0, saliency="deviation", beta_d="code", retain=0.3, branches=("cond", "uncond")),
        branches=("cond", "uncond"),
    ),
]

"""All cameras on one canvas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdover_world.scene.cameras import STITCH_ROWS

Rect = tuple[int, int, int, int]  # left, top, width, height in pixels


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Where each camera lies on a picture of ``width`` by ``height`` pixels, both even, as video coders want them."""

    width: int
    height: int
    rects: Mapping[str, Rect]

    def compose(self, pictures: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """One picture ``[height, width, 3]`` of each camera's ``[h, w, 3]``; what no camera covers is black."""
        canvas = np.zeros((self.height, self.width, 3), np.uint8)
        for name, (left, top, width, height) in self.rects.items():
            canvas[top : top + height, left : left + width] = pictures[name]
        return canvas


def arrange(sizes: Mapping[str, tuple[int, int]]) -> Canvas:
    """Lay cameras of given ``(width, height)`` out in centred rows: those of the reference rig as `stitch` does.

    Other cameras stand in the order given, as many in a row as there are rows.
    """
    rig = [tuple(name for name in row if name in sizes) for row in STITCH_ROWS]
    rows = [row for row in rig if row]
    if sum(map(len, rows)) < len(sizes):
        rows = _square(tuple(sizes))
    widths = [sum(sizes[name][0] for name in row) for row in rows]
    rects: dict[str, Rect] = {}
    top = 0
    for row, width in zip(rows, widths, strict=True):
        left = (max(widths) - width) // 2
        for name in row:
            rects[name] = (left, top, *sizes[name])
            left += sizes[name][0]
        top += max(sizes[name][1] for name in row)
    return Canvas(width=max(widths) + max(widths) % 2, height=top + top % 2, rects=rects)


def _square(names: Sequence[str]) -> list[tuple[str, ...]]:
    columns = math.ceil(math.sqrt(len(names)))
    return [tuple(names[i : i + columns]) for i in range(0, len(names), columns)]

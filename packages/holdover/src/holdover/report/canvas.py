"""All cameras on one canvas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rect = tuple[int, int, int, int]  # left, top, width, height in pixels
Rows = Sequence[Sequence[str]]  # names of cameras, row by row


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


def arrange(sizes: Mapping[str, tuple[int, int]], rows: Rows | None = None) -> Canvas:
    """Lay cameras of given ``(width, height)`` out in centred rows.

    Args:
        sizes: of the cameras.
        rows: the names of the cameras in each row, from the top; may name cameras that are not there. Where it is None
            or leaves a camera out, the cameras stand in a square grid, in the order of ``sizes``.
    """
    found = [[name for name in row if name in sizes] for row in rows or ()]
    laid = [row for row in found if row]
    if sum(map(len, laid)) < len(sizes):
        laid = _square(tuple(sizes))
    widths = [sum(sizes[name][0] for name in row) for row in laid]
    rects: dict[str, Rect] = {}
    top = 0
    for row, width in zip(laid, widths, strict=True):
        left = (max(widths) - width) // 2
        for name in row:
            rects[name] = (left, top, *sizes[name])
            left += sizes[name][0]
        top += max(sizes[name][1] for name in row)
    return Canvas(width=max(widths) + max(widths) % 2, height=top + top % 2, rects=rects)


def _square(names: Sequence[str]) -> list[list[str]]:
    columns = math.ceil(math.sqrt(len(names)))
    return [list(names[i : i + columns]) for i in range(0, len(names), columns)]

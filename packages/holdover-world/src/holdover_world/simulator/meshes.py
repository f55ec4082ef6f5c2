"""Flat-shaded geometry as plain arrays: scenes are built of it, and the renderer uploads it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from holdover_world.scene.palette import PAINT, SHADE, SUN, Colour
from holdover_world.scene.vehicles import LENGTH, WIDTH
from holdover_world.simulator.roads import Points, arc_lengths, offset

Vector = NDArray[np.float64]

WHITE: Colour = (1.0, 1.0, 1.0)
CAR_COLOURS: tuple[Colour, ...] = (
    (0.92, 0.92, 0.92),
    (0.78, 0.13, 0.12),
    (0.14, 0.32, 0.70),
    (0.95, 0.76, 0.15),
    (0.25, 0.27, 0.30),
)
_TRUNK: Colour = (0.36, 0.26, 0.18)
_GLASS: Colour = (0.16, 0.20, 0.26)
_TYRE: Colour = (0.07, 0.07, 0.08)
_TAIL: Colour = (0.85, 0.05, 0.05)
_LAMP: Colour = (1.0, 0.97, 0.80)
_SQUARE = 240.0  # metres: geometry is split into squares of this size, so that those out of sight are culled


class Solid(NamedTuple):
    """The box that a thing roughly fills: middle, heading, length, width, bottom and top (metres, radians), colour."""

    x: float
    y: float
    yaw: float
    length: float
    width: float
    bottom: float
    top: float
    colour: Colour


class Mesh:
    """Quads by material and by square of the map. Each has a fixed shade, because the sun never moves.

    ``solids`` are the boxes of the things that stand there, for a `holdover_world.scene.layout.Layout`.
    """

    def __init__(self) -> None:
        self.parts: dict[tuple[str, int, int], list[Vector]] = defaultdict(list)
        self.solids: list[Solid] = []

    def quad(self, material: str, corners: Vector, uv: Vector | None = None, colour: Colour = WHITE) -> None:
        """Add a quad ``[4, 3]``, counter-clockwise as seen from outside. A triangle repeats its last corner."""
        shade = _shade(corners)
        vertices = np.zeros((4, 8))
        vertices[:, 0:3] = corners
        vertices[:, 3:5] = 0.0 if uv is None else uv
        vertices[:, 5:8] = np.minimum(np.asarray(colour) * shade, 1.0)
        x, y = corners[:, :2].sum(axis=0) / 4
        self.parts[material, int(x // _SQUARE), int(y // _SQUARE)].append(vertices)

    def flat(
        self,
        material: str,
        x: tuple[float, float],
        y: tuple[float, float],
        z: float,
        colour: Colour = WHITE,
        *,
        tile: float = 1.0,
    ) -> None:
        """Add a horizontal rectangle. Its texture repeats every ``tile`` metres of the world."""
        corners = np.array([(x[0], y[0], z), (x[1], y[0], z), (x[1], y[1], z), (x[0], y[1], z)])
        self.quad(material, corners, corners[:, :2] / tile, colour)

    def wall(
        self,
        material: str,
        a: Sequence[float] | Vector,
        b: Sequence[float] | Vector,
        z: tuple[float, float],
        colour: Colour = WHITE,
        *,
        tile: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Add an upright rectangle from ``a`` to ``b``. It is visible from the right of that direction."""
        corners = np.array([(*a[:2], z[0]), (*b[:2], z[0]), (*b[:2], z[1]), (*a[:2], z[1])])
        across = float(np.hypot(b[0] - a[0], b[1] - a[1])) / tile[0]
        up = (z[1] - z[0]) / tile[1]
        self.quad(material, corners, np.array([(0, 0), (across, 0), (across, up), (0, up)]), colour)

    def box(
        self,
        centre: tuple[float, float],
        size: tuple[float, float],
        z: tuple[float, float],
        colour: Colour = WHITE,
        *,
        yaw: float = 0.0,
        top: Colour | None = None,
        taper: float = 0.0,
        material: str = "plain",
        tile: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Add a box without a floor. Its top is ``taper`` metres shorter at each end."""
        low, high = _rectangle(centre, size, yaw), _rectangle(centre, (size[0] - 2 * taper, size[1] - taper), yaw)
        for i in range(4):
            j = (i + 1) % 4
            corners = np.array([(*low[i], z[0]), (*low[j], z[0]), (*high[j], z[1]), (*high[i], z[1])])
            across, up = float(np.hypot(*(low[j] - low[i]))) / tile[0], (z[1] - z[0]) / tile[1]
            self.quad(material, corners, np.array([(0, 0), (across, 0), (across, up), (0, up)]), colour)
        self.quad("plain", np.array([(*p, z[1]) for p in high]), None, top or colour)

    def ribbon(
        self,
        material: str,
        line: Points,
        left: tuple[float, float],
        z: float,
        colour: Colour = WHITE,
        *,
        tile: float = 1.0,
    ) -> None:
        """Add a flat strip along ``line`` between two offsets to its left, the smaller offset first."""
        inner, outer, along = offset(line, left[0]), offset(line, left[1]), arc_lengths(line)
        for i in range(len(line) - 1):
            corners = np.array([(*inner[i], z), (*inner[i + 1], z), (*outer[i + 1], z), (*outer[i], z)])
            s, d = along[i : i + 2] / tile, np.asarray(left) / tile
            self.quad(material, corners, np.array([(s[0], d[0]), (s[1], d[0]), (s[1], d[1]), (s[0], d[1])]), colour)

    def dashes(self, line: Points, left: float, z: float, *, dash: float, gap: float, width: float) -> None:
        """Paint a dashed line along ``line``, ``left`` metres to its left."""
        edges = [offset(line, left - width / 2), offset(line, left + width / 2)]
        along = arc_lengths(line)
        for start in np.arange(gap / 2, along[-1] - dash, dash + gap):
            ends = np.array([start, start + dash])
            (a, b), (d, c) = (np.stack([np.interp(ends, along, e[:, k]) for k in (0, 1)], axis=1) for e in edges)
            self.quad("plain", np.array([(*p, z) for p in (a, b, c, d)]), None, PAINT)

    def tree(self, x: float, y: float, *, height: float, colour: Colour) -> None:
        """Add a tree: a trunk and a crown of two pyramids."""
        radius, low, waist = 0.3 * height, 0.25 * height, 0.5 * height
        self.solids.append(Solid(x, y, 0.0, 0.4, 0.4, 0.0, low + 0.5, _TRUNK))
        self.solids.append(Solid(x, y, 0.0, 1.3 * radius, 1.3 * radius, 0.33 * height, 0.72 * height, colour))
        self.solids.append(Solid(x, y, 0.0, 0.5 * radius, 0.5 * radius, 0.72 * height, 0.92 * height, colour))
        self.box((x, y), (0.4, 0.4), (0.0, low + 0.5), _TRUNK)
        angles = np.arange(6) * np.pi / 3
        ring = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles), np.full(6, waist)], axis=1)
        for i in range(6):
            a, b = ring[i], ring[(i + 1) % 6]
            top, bottom = np.array([x, y, height]), np.array([x, y, low])
            self.quad("plain", np.array([a, b, top, top]), None, colour)
            self.quad("plain", np.array([b, a, bottom, bottom]), None, colour)

    def car(self, x: float, y: float, yaw: float, colour: Colour, *, van: bool = False) -> None:
        """Add a car with its middle at (x, y), heading ``yaw`` radians."""
        self.solids += car_solids(x, y, yaw, colour, van=van)
        body, roof, cabin, back = _proportions(van)
        middle = np.array([x, y]) + _rotation(yaw) @ (-back, 0.0)
        self.box((x, y), (LENGTH, WIDTH), (0.25, body), colour, yaw=yaw)
        self.box((middle[0], middle[1]), (cabin, WIDTH - 0.1), (0.95, roof), _GLASS, yaw=yaw, top=colour, taper=0.45)
        front, side = LENGTH / 2 + 0.02, WIDTH / 2 + 0.02
        for half in (-1, 1):
            near, far = sorted((half * 0.4, half * 0.85))
            self._plate(x, y, yaw, (-front, far), (-front, near), (0.6, 0.88), _TAIL)
            self._plate(x, y, yaw, (front, near), (front, far), (0.55, 0.8), _LAMP)
            for wheel in (-1.35, 1.35):
                ends = (wheel - 0.36 * half, -half * side), (wheel + 0.36 * half, -half * side)
                self._plate(x, y, yaw, *ends, (0.0, 0.62), _TYRE)
        for a, b in (((-front, 0.8), (-front, -0.8)), ((front, -0.8), (front, 0.8))):
            self._plate(x, y, yaw, a, b, (0.05, 0.3), _TYRE)

    def _plate(
        self,
        x: float,
        y: float,
        yaw: float,
        a: tuple[float, float],
        b: tuple[float, float],
        z: tuple[float, float],
        colour: Colour,
    ) -> None:
        """Add an upright rectangle given in a car's own coordinates, visible from the right of a to b."""
        origin, turn = np.array([x, y]), _rotation(yaw)
        self.wall("plain", origin + turn @ np.asarray(a), origin + turn @ np.asarray(b), z, colour)


def car_solids(x: float, y: float, yaw: float, colour: Colour, *, van: bool) -> list[Solid]:
    """The boxes of a car: its body and its cabin."""
    body, roof, cabin, back = _proportions(van)
    middle = x - back * math.cos(yaw), y - back * math.sin(yaw)
    return [
        Solid(x, y, yaw, LENGTH, WIDTH, 0.15, body, colour),
        Solid(*middle, yaw, cabin - 0.4, WIDTH - 0.2, body, roof, _GLASS),
    ]


def _proportions(van: bool) -> tuple[float, float, float, float]:
    """Proportions of a car in metres: height of body and roof, length of the cabin, and its offset backwards."""
    return (1.15, 2.1, 3.4, 0.35) if van else (0.98, 1.5, 2.5, 0.25)


def _rotation(yaw: float) -> Vector:
    return np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])


def _rectangle(centre: tuple[float, float], size: tuple[float, float], yaw: float) -> Vector:
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]) * size
    turned: Vector = corners @ _rotation(yaw).T + np.asarray(centre)
    return turned


def _shade(corners: Vector) -> float:
    """Brightness of a face: flat ground is 1, faces away from the sun are darkest."""
    # Written out, because numpy's cross product is the slowest part of a scene with thousands of tiny faces.
    (ax, ay, az), (bx, by, bz) = (corners[1] - corners[0]).tolist(), (corners[2] - corners[0]).tolist()
    x, y, z = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
    length = math.sqrt(x * x + y * y + z * z)
    facing = (x * SUN[0] + y * SUN[1] + z * SUN[2]) / length if length else 0.0
    along, towards, away = SHADE
    return along + (towards if facing > 0 else away) * facing

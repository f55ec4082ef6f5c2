"""The three scenarios: their roads as lanes, and everything beside them as geometry.

A scene depends on its seed alone. Seeds change where things stand, never what they look like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from holdover.world.meshes import CAR_COLOURS, Colour, Mesh
from holdover.world.roads import Lane, Points, arc, arc_lengths, normals, offset
from holdover.world.textures import FACADES

Point = tuple[float, float]

_LEAVES: tuple[Colour, ...] = ((0.27, 0.46, 0.20), (0.36, 0.54, 0.24))
_KERB: Colour = (0.74, 0.74, 0.72)
_ROOF: Colour = (0.56, 0.27, 0.22)
_YELLOW: Colour = (0.90, 0.70, 0.16)
_PAINT_Z, _ROAD_Z, _KERB_Z = 0.03, 0.015, 0.12  # metres: layers apart enough for the depth buffer
_TILE = 120.0  # metres of grass in one piece
_LINE = 0.24  # metres: wider than real lines, or they would vanish at 128 pixels


@dataclass(kw_only=True)
class Scene:
    """A world to drive in.

    ``starts`` are (lane, metres) where an ego may begin; ``span`` is the length in metres of the window around the ego
    in which traffic lives on through roads, or None where traffic stays in a closed network.
    """

    scenario: str
    lanes: list[Lane]
    mesh: Mesh
    starts: list[tuple[int, float]]
    cars: int
    cruise: tuple[float, float]
    span: float | None = None
    opposite: dict[int, int] = field(default_factory=dict)


def build_scene(scenario: str, seed: int) -> Scene:
    """Build a scenario's world for a seed.

    Raises:
        ValueError: if there is no such scenario.
    """
    if scenario not in _BUILDERS:
        raise ValueError(f"unknown scenario {scenario!r}: choose one of {', '.join(SCENARIOS)}")
    return _BUILDERS[scenario](np.random.default_rng([seed, 1]))


# Urban: a grid of streets with one lane and one row of parked cars per direction.

_GRID = 5  # junctions per side
_BLOCK = 83.0  # metres between street centres
_LANE, _HALF_ROAD, _HALF_STREET = 1.75, 5.8, 9.5  # metres from a street's centre: lane, kerb, house fronts
_JUNCTION = 9.0  # metres from a junction's centre to the stop lines
_LOT, _FLOOR = 16.0, 3.2  # metres: width of a house, height of a floor
_HEADINGS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def _urban(rng: np.random.Generator) -> Scene:
    mesh = Mesh()
    edge = _GRID * _BLOCK
    _meadow(mesh, (-300.0, edge + 300.0), (-300.0, edge + 300.0))
    for i in range(_GRID):
        for j in range(_GRID):
            _crossing(mesh, i, j)
    for i in range(-1, _GRID):
        for j in range(-1, _GRID):
            _houses(mesh, rng, i * _BLOCK + _HALF_STREET, j * _BLOCK + _HALF_STREET)
    for i in range(_GRID):
        for j in range(_GRID):
            for heading in (0, 1):
                if _has_junction(i + _HEADINGS[heading][0], j + _HEADINGS[heading][1]):
                    _street(mesh, rng, i, j, heading)
    lanes = _street_lanes()
    starts = [
        (k, s)
        for k, lane in enumerate(lanes)
        if lane.junction is None and np.abs(lane.points.mean(axis=0) - edge / 2 + _BLOCK / 2).max() < 1.6 * _BLOCK
        for s in (8.0, 20.0, 32.0)
    ]
    return Scene(scenario="urban", lanes=lanes, mesh=mesh, starts=starts, cars=30, cruise=(6.0, 12.0))


def _has_junction(i: int, j: int) -> bool:
    return 0 <= i < _GRID and 0 <= j < _GRID


def _street_lanes() -> list[Lane]:
    lanes: list[Lane] = []
    leaving: dict[tuple[int, int, int], int] = {}  # (junction, heading) -> lane
    places = [(i, j) for i in range(_GRID) for j in range(_GRID)]
    for i, j in places:
        for heading, (dx, dy) in enumerate(_HEADINGS):
            if _has_junction(i + dx, j + dy):
                along, centre = np.array([dx, dy], dtype=float), np.array([i, j]) * _BLOCK
                right = np.array([dy, -dx]) * _LANE
                s = np.linspace(_JUNCTION, _BLOCK - _JUNCTION, 34)[:, None]
                leaving[i, j, heading] = len(lanes)
                lanes.append(Lane(points=centre + right + s * along, limit=12.0))
    for (i, j, heading), lane in leaving.items():
        ahead = i + _HEADINGS[heading][0], j + _HEADINGS[heading][1]
        for turn in (0, 1, -1):
            onward = leaving.get((*ahead, (heading + turn) % 4))
            if onward is not None:
                lanes[lane].successors.append(len(lanes))
                points = _turn(lanes[lane].points[-1], heading, turn)
                limit = 12.0 if turn == 0 else 5.5
                crossing = Lane(points=points, limit=limit, successors=[onward], junction=ahead[0] * _GRID + ahead[1])
                lanes.append(crossing)
    return lanes


def _turn(start: Points, heading: int, turn: int) -> Points:
    """The way through a junction: straight on (0), to the left (1) or to the right (-1)."""
    dx, dy = _HEADINGS[heading]
    if turn == 0:
        return start + np.linspace(0.0, 2 * _JUNCTION, 10)[:, None] * (dx, dy)
    radius = _JUNCTION + turn * _LANE
    centre = start + turn * radius * np.array([-dy, dx])
    first = math.atan2(dy, dx) - turn * math.pi / 2
    return arc((float(centre[0]), float(centre[1])), radius, first, first + turn * math.pi / 2)


def _crossing(mesh: Mesh, i: int, j: int) -> None:
    x, y, half = i * _BLOCK, j * _BLOCK, _HALF_ROAD
    mesh.flat("asphalt", (x - half, x + half), (y - half, y + half), _ROAD_Z, tile=12.0)


def _street(mesh: Mesh, rng: np.random.Generator, i: int, j: int, heading: int) -> None:
    """The street from junction (i, j) to its neighbour in +x (heading 0) or +y (heading 1)."""
    dx, dy = _HEADINGS[heading]
    start, along, left = np.array([i, j]) * _BLOCK, np.array([dx, dy], dtype=float), np.array([-dy, dx], dtype=float)

    def strip(
        material: str, s: tuple[float, float], d: tuple[float, float], z: float, colour: Colour, tile: float = 1.0
    ) -> None:
        a, b = start + s[0] * along + d[0] * left, start + s[1] * along + d[1] * left
        x, y = (min(a[0], b[0]), max(a[0], b[0])), (min(a[1], b[1]), max(a[1], b[1]))
        mesh.flat(material, x, y, z, colour, tile=tile)

    white: Colour = (1.0, 1.0, 1.0)
    paint: Colour = (0.93, 0.93, 0.90)
    inside = (_HALF_ROAD, _BLOCK - _HALF_ROAD)
    strip("asphalt", inside, (-_HALF_ROAD, _HALF_ROAD), _ROAD_Z, white, 12.0)
    for side in (-1, 1):
        near, far = side * _HALF_ROAD, side * _HALF_STREET
        strip("slabs", inside, (min(near, far), max(near, far)), _KERB_Z, white, 4.0)
        a, b = start + inside[0] * along + near * left, start + inside[1] * along + near * left
        mesh.wall("plain", *((a, b) if side > 0 else (b, a)), (0.0, _KERB_Z), _KERB)
        strip("plain", inside, tuple(sorted((near, near + side * 0.35))), _KERB_Z + 0.015, _KERB)  # type: ignore[arg-type]
        bay = side * (_LANE + 1.75)
        strip("plain", (16.0, _BLOCK - 16.0), (bay - 0.1, bay + 0.1), _PAINT_Z, paint)
    for s in np.arange(14.0, _BLOCK - 15.0, 8.0):
        strip("plain", (s, s + 4.0), (-_LINE / 2, _LINE / 2), _PAINT_Z, paint)
    for end, stop in ((6.1, 9.2), (_BLOCK - 8.5, _BLOCK - 9.6)):
        a, b = start + end * along - _HALF_ROAD * left, start + (end + 2.4) * along + _HALF_ROAD * left
        low, high = np.minimum(a, b), np.maximum(a, b)
        corners = np.array([(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])])
        across = (corners @ left)[:, None] * (1 / 1.6, 0.0)
        mesh.quad("zebra", np.concatenate([corners, np.full((4, 1), _PAINT_Z)], axis=1), across)
        incoming = (-_HALF_ROAD, 0.0) if end > 10 else (0.0, _HALF_ROAD)
        strip("plain", (stop, stop + 0.5), incoming, _PAINT_Z, paint)
    _beside_street(mesh, rng, start, along, left)


def _beside_street(mesh: Mesh, rng: np.random.Generator, start: Points, along: Points, left: Points) -> None:
    """Parked cars and trees."""
    yaw = math.atan2(along[1], along[0])
    for side in (-1, 1):
        for s in np.arange(20.0, _BLOCK - 18.0, 6.6):
            if rng.random() < 0.55:
                x, y = start + s * along + side * (_HALF_ROAD - 1.15) * left
                colour = CAR_COLOURS[int(rng.integers(len(CAR_COLOURS)))]
                mesh.car(x, y, yaw + math.pi * (side > 0), colour, van=rng.random() < 0.2)
        for s in np.arange(17.0, _BLOCK - 15.0, 16.0):
            if rng.random() < 0.4:
                x, y = start + s * along + side * (_HALF_ROAD + 1.3) * left
                mesh.tree(x, y, height=5.5, colour=_LEAVES[int(rng.integers(2))])


def _houses(mesh: Mesh, rng: np.random.Generator, x0: float, y0: float) -> None:
    """One block: four lots per side, facing outwards all around."""
    for i in range(4):
        for j in range(4):
            if 0 < i < 3 and 0 < j < 3:
                continue
            low, high = (x0 + i * _LOT, y0 + j * _LOT), (x0 + (i + 1) * _LOT, y0 + (j + 1) * _LOT)
            if rng.random() < 0.1:
                mesh.flat("grass", (low[0], high[0]), (low[1], high[1]), 0.1, tile=16.0)
                for dx, dy in ((4.0, 5.0), (11.0, 10.0)):
                    mesh.tree(low[0] + dx, low[1] + dy, height=7.5, colour=_LEAVES[int(rng.integers(2))])
            else:
                facade, floors = FACADES[int(rng.integers(len(FACADES)))], int(rng.choice([3, 4, 5]))
                _house(mesh, low, high, facade, floors, outside=(j == 0, i == 3, j == 3, i == 0))


def _house(
    mesh: Mesh, low: Point, high: Point, facade: str, floors: int, outside: tuple[bool, bool, bool, bool]
) -> None:
    """A town house; ``outside`` says which walls (south, east, north, west) stand on a street and so have shops."""
    corners = [low, (high[0], low[1]), high, (low[0], high[1])]
    for k in range(4):
        a, b = corners[k], corners[(k + 1) % 4]
        mesh.wall("shop" if outside[k] else "plain", a, b, (0.0, _FLOOR), tile=(4.0, _FLOOR))
        mesh.wall(facade, a, b, (_FLOOR, floors * _FLOOR), tile=(4.0, _FLOOR))
        mesh.wall("plain", a, b, (floors * _FLOOR, floors * _FLOOR + 0.6), (0.45, 0.42, 0.40))


# Highway and the road of the U-turns: one long road with several lanes per direction.

_ROAD_LENGTH = 1700.0  # metres


def _highway(rng: np.random.Generator) -> Scene:
    mesh = Mesh()
    line = _winding(rng, radius=700.0)
    width, median, lanes = 3.75, 2.0, 3
    edge = median + lanes * width
    _meadow(mesh, (-500.0, _ROAD_LENGTH + 500.0), (-700.0, 700.0))
    for side in (-1, 1):
        span = sorted((side * median / 2, side * (edge + 2.6)))
        mesh.ribbon("asphalt", line, (span[0], span[1]), _ROAD_Z, tile=12.0)
        for d in (median, edge):
            _solid(mesh, line, side * d)
        for k in range(1, lanes):
            mesh.dashes(line, side * (median + k * width), _PAINT_Z, dash=6.0, gap=9.0, width=_LINE)
        _rail(mesh, line, side * (edge + 3.2))
    _rail(mesh, line, 0.0)
    s = 0.0
    while s < _ROAD_LENGTH - 160.0:  # stretches of noise wall, trees or open land
        length = float(rng.uniform(80.0, 150.0))
        for side in (-1, 1):
            kind = rng.choice(["barrier", "trees", "open"], p=[0.2, 0.5, 0.3])
            if kind == "barrier":
                _noise_wall(mesh, _cut(line, s, s + length), side * (edge + 6.0), side)
            elif kind == "trees":
                _trees(
                    mesh,
                    rng,
                    _cut(line, s, s + length),
                    side,
                    (edge + 9.0, edge + 32.0),
                    count=int(length / 8),
                    height=9.0,
                )
        s += length
    road = _parallel_lanes(
        line, [side * (median + (k + 0.5) * width) for side in (-1, 1) for k in range(lanes)], (27.0, 24.0, 20.0)
    )
    starts = [(k, s) for k in range(3) for s in (250.0, 330.0, 410.0, 490.0, 570.0)]
    return Scene(scenario="highway", lanes=road, mesh=mesh, starts=starts, cars=42, cruise=(18.0, 30.0), span=560.0)


def _uturn(rng: np.random.Generator) -> Scene:
    mesh = Mesh()
    line = np.stack([np.arange(0.0, _ROAD_LENGTH, 10.0), np.zeros(int(_ROAD_LENGTH // 10))], axis=1)
    width, median, lanes = 3.6, 1.0, 2
    edge = median + lanes * width + 0.4
    _meadow(mesh, (-500.0, _ROAD_LENGTH + 500.0), (-500.0, 500.0))
    mesh.ribbon("asphalt", line, (-edge, edge), _ROAD_Z, tile=12.0)
    mesh.ribbon("plain", line, (-0.22, 0.22), _PAINT_Z, _YELLOW)
    for side in (-1, 1):
        mesh.dashes(line, side * (median + width), _PAINT_Z, dash=4.0, gap=6.0, width=_LINE)
        span = sorted((side * edge, side * (edge + 3.0)))
        mesh.ribbon("slabs", line, (span[0], span[1]), _KERB_Z, tile=4.0)
        kerb = offset(line, side * edge)
        for a, b in zip(kerb[:-1], kerb[1:], strict=True):
            mesh.wall("plain", *((a, b) if side > 0 else (b, a)), (0.0, _KERB_Z), _KERB)
        _suburb(mesh, rng, side, edge)
    road = _parallel_lanes(
        line, [side * (median + (k + 0.5) * width) for side in (-1, 1) for k in range(lanes)], (9.5, 8.0)
    )
    starts = [(k, s) for k in (1, 3) for s in (640.0, 700.0, 760.0, 820.0, 880.0)]
    return Scene(
        scenario="uturn",
        lanes=road,
        mesh=mesh,
        starts=starts,
        cars=8,
        cruise=(6.0, 11.0),
        span=420.0,
        opposite={1: 3, 3: 1},
    )


def _suburb(mesh: Mesh, rng: np.random.Generator, side: int, edge: float) -> None:
    """Houses with gables and gardens along the straight road."""
    for x in np.arange(200.0, _ROAD_LENGTH - 200.0, 22.0):
        kind = rng.random()
        y = side * (edge + 13.0)
        if kind < 0.65:
            _cottage(mesh, x, y, FACADES[int(rng.integers(len(FACADES)))])
        elif kind < 0.9:
            for dx in (-5.0, 4.0):
                mesh.tree(x + dx, y, height=8.0, colour=_LEAVES[int(rng.integers(2))])
        if rng.random() < 0.5:
            mesh.tree(x + 11.0, side * (edge + 4.6), height=5.5, colour=_LEAVES[int(rng.integers(2))])
        if rng.random() < 0.25:
            colour = CAR_COLOURS[int(rng.integers(len(CAR_COLOURS)))]
            mesh.car(x + 9.0, side * (edge + 6.5), side * math.pi / 2, colour)


def _cottage(mesh: Mesh, x: float, y: float, facade: str) -> None:
    half_x, half_y, eaves, ridge = 6.0, 5.0, 6.4, 9.6
    corners = [(x - half_x, y - half_y), (x + half_x, y - half_y), (x + half_x, y + half_y), (x - half_x, y + half_y)]
    for k in range(4):
        mesh.wall(facade, corners[k], corners[(k + 1) % 4], (0.0, eaves), tile=(4.0, _FLOOR))
    west, east = (x - half_x - 0.4, y, ridge), (x + half_x + 0.4, y, ridge)
    for side in (-1, 1):
        low = [
            (x - half_x - 0.4, y + side * (half_y + 0.5), eaves - 0.2),
            (x + half_x + 0.4, y + side * (half_y + 0.5), eaves - 0.2),
        ]
        roof = [*low, east, west] if side < 0 else [*low[::-1], west, east]
        mesh.quad("plain", np.array(roof), None, _ROOF)
        top = (x + side * half_x, y, ridge - 0.2)
        gable = [(x + side * half_x, y - side * half_y, eaves), (x + side * half_x, y + side * half_y, eaves), top, top]
        mesh.quad("plain", np.array(gable), None, (0.84, 0.80, 0.72))


def _meadow(mesh: Mesh, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Grass all around, in tiles small enough for the haze, which is computed at their corners."""
    for low_x in np.arange(x[0], x[1], _TILE):
        for low_y in np.arange(y[0], y[1], _TILE):
            mesh.flat("grass", (low_x, low_x + _TILE), (low_y, low_y + _TILE), -0.05, tile=16.0)


def _winding(rng: np.random.Generator, radius: float) -> Points:
    """A line along +x whose bends are never tighter than ``radius``."""
    s = np.arange(0.0, _ROAD_LENGTH, 10.0)
    phase, wavelength = rng.uniform(0, 2 * math.pi), rng.uniform(500.0, 900.0)
    yaw = np.cumsum(np.sin(2 * math.pi * s / wavelength + phase) / radius * 10.0)
    yaw -= yaw.mean()
    return np.stack([np.cumsum(np.cos(yaw)), np.cumsum(np.sin(yaw))], axis=1) * 10.0


def _parallel_lanes(line: Points, offsets: list[float], limits: tuple[float, ...]) -> list[Lane]:
    """Lanes along a road, first those driven along ``line`` (to its right), each side from the median outwards."""
    per_side = len(offsets) // 2
    lanes = []
    for k, left in enumerate(offsets):
        points = offset(line, left)
        rank = k % per_side
        inner, outer = k - 1 if rank else None, k + 1 if rank < per_side - 1 else None
        lanes.append(
            Lane(points=points if k < per_side else points[::-1].copy(), limit=limits[rank], left=inner, right=outer)
        )
    return lanes


def _cut(line: Points, start: float, end: float) -> Points:
    along = arc_lengths(line)
    s = np.arange(start, end + 0.1, 10.0)
    return np.stack([np.interp(s, along, line[:, 0]), np.interp(s, along, line[:, 1])], axis=1)


def _solid(mesh: Mesh, line: Points, left: float) -> None:
    mesh.ribbon("plain", line, (left - _LINE / 2, left + _LINE / 2), _PAINT_Z, (0.93, 0.93, 0.90))


def _rail(mesh: Mesh, line: Points, left: float) -> None:
    """A guard rail, seen from both sides."""
    rail = offset(line, left)
    for a, b in zip(rail[:-1], rail[1:], strict=True):
        for start, end in ((a, b), (b, a)):
            mesh.wall("plain", start, end, (0.3, 0.8), (0.95, 0.96, 0.97))


def _noise_wall(mesh: Mesh, line: Points, left: float, side: int) -> None:
    wall = offset(line, left)
    for a, b in zip(wall[:-1], wall[1:], strict=True):
        mesh.wall("barrier", *((a, b) if side > 0 else (b, a)), (0.0, 3.6), tile=(10.0, 3.6))


def _trees(
    mesh: Mesh,
    rng: np.random.Generator,
    line: Points,
    side: int,
    away: tuple[float, float],
    *,
    count: int,
    height: float,
) -> None:
    across, along = normals(line), arc_lengths(line)
    for _ in range(count):
        s, d = rng.uniform(0.0, along[-1]), side * rng.uniform(*away)
        k = int(np.searchsorted(along, s, side="right")) - 1
        x, y = line[k] + across[k] * d
        mesh.tree(x, y, height=height, colour=_LEAVES[int(rng.integers(2))])


_BUILDERS: Mapping[str, Callable[[np.random.Generator], Scene]] = {
    "urban": _urban,
    "highway": _highway,
    "uturn": _uturn,
}

#: The scenarios there are.
SCENARIOS: tuple[str, ...] = tuple(_BUILDERS)

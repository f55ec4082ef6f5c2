"""The urban scenario: a grid of streets with one lane and one row of parked cars per direction."""

from __future__ import annotations

import math

import numpy as np

from holdover_world.scene.palette import KERB, PAINT, Colour
from holdover_world.simulator.meshes import CAR_COLOURS, WHITE, Mesh, Solid
from holdover_world.simulator.roads import Lane, Points, arc
from holdover_world.simulator.scenery import FLOOR, KERB_Z, LEAVES, LINE, PAINT_Z, ROAD_Z, Point, Scene, meadow
from holdover_world.simulator.textures import FACADES, mean_colour

_GRID = 5  # junctions per side
_BLOCK = 83.0  # metres between street centres
_LANE, _HALF_ROAD, _HALF_STREET = 1.75, 5.8, 9.5  # metres from a street's centre: lane, kerb, house fronts
_JUNCTION = 9.0  # metres from a junction's centre to the stop lines
_LOT = 16.0  # metres: width of a house
_HEADINGS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def build_town(rng: np.random.Generator) -> Scene:
    """Streets and junctions, with houses and parked cars on both sides."""
    mesh = Mesh()
    edge = _GRID * _BLOCK
    meadow(mesh, (-300.0, edge + 300.0), (-300.0, edge + 300.0))
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
    mesh.flat("asphalt", (x - half, x + half), (y - half, y + half), ROAD_Z, tile=12.0)


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

    inside = (_HALF_ROAD, _BLOCK - _HALF_ROAD)
    strip("asphalt", inside, (-_HALF_ROAD, _HALF_ROAD), ROAD_Z, WHITE, 12.0)
    for side in (-1, 1):
        near, far = side * _HALF_ROAD, side * _HALF_STREET
        strip("slabs", inside, (min(near, far), max(near, far)), KERB_Z, WHITE, 4.0)
        a, b = start + inside[0] * along + near * left, start + inside[1] * along + near * left
        mesh.wall("plain", *((a, b) if side > 0 else (b, a)), (0.0, KERB_Z), KERB)
        strip("plain", inside, tuple(sorted((near, near + side * 0.35))), KERB_Z + 0.015, KERB)  # type: ignore[arg-type]
        bay = side * (_LANE + 1.75)
        strip("plain", (16.0, _BLOCK - 16.0), (bay - 0.1, bay + 0.1), PAINT_Z, PAINT)
    for s in np.arange(14.0, _BLOCK - 15.0, 8.0):
        strip("plain", (s, s + 4.0), (-LINE / 2, LINE / 2), PAINT_Z, PAINT)
    for end, stop in ((6.1, 9.2), (_BLOCK - 8.5, _BLOCK - 9.6)):
        a, b = start + end * along - _HALF_ROAD * left, start + (end + 2.4) * along + _HALF_ROAD * left
        low, high = np.minimum(a, b), np.maximum(a, b)
        corners = np.array([(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])])
        across = (corners @ left)[:, None] * (1 / 1.6, 0.0)
        mesh.quad("zebra", np.concatenate([corners, np.full((4, 1), PAINT_Z)], axis=1), across)
        incoming = (-_HALF_ROAD, 0.0) if end > 10 else (0.0, _HALF_ROAD)
        strip("plain", (stop, stop + 0.5), incoming, PAINT_Z, PAINT)
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
                mesh.tree(x, y, height=5.5, colour=LEAVES[int(rng.integers(2))])


def _houses(mesh: Mesh, rng: np.random.Generator, x0: float, y0: float) -> None:
    """One block of houses: four lots per side, facing outwards."""
    for i in range(4):
        for j in range(4):
            if 0 < i < 3 and 0 < j < 3:
                continue
            low, high = (x0 + i * _LOT, y0 + j * _LOT), (x0 + (i + 1) * _LOT, y0 + (j + 1) * _LOT)
            if rng.random() < 0.1:
                mesh.flat("grass", (low[0], high[0]), (low[1], high[1]), 0.1, tile=16.0)
                for dx, dy in ((4.0, 5.0), (11.0, 10.0)):
                    mesh.tree(low[0] + dx, low[1] + dy, height=7.5, colour=LEAVES[int(rng.integers(2))])
            else:
                facade, floors = FACADES[int(rng.integers(len(FACADES)))], int(rng.choice([3, 4, 5]))
                _house(mesh, low, high, facade, floors, outside=(j == 0, i == 3, j == 3, i == 0))


def _house(
    mesh: Mesh, low: Point, high: Point, facade: str, floors: int, outside: tuple[bool, bool, bool, bool]
) -> None:
    """A town house. Its ``outside`` walls (south, east, north, west) stand on a street and have shops."""
    corners = [low, (high[0], low[1]), high, (low[0], high[1])]
    middle = (low[0] + high[0]) / 2, (low[1] + high[1]) / 2
    for material, bottom, top in (("shop", 0.0, FLOOR), (facade, FLOOR, floors * FLOOR + 0.6)):
        mesh.solids.append(Solid(*middle, 0.0, _LOT, _LOT, bottom, top, mean_colour(material)))
    for k in range(4):
        a, b = corners[k], corners[(k + 1) % 4]
        mesh.wall("shop" if outside[k] else "plain", a, b, (0.0, FLOOR), tile=(4.0, FLOOR))
        mesh.wall(facade, a, b, (FLOOR, floors * FLOOR), tile=(4.0, FLOOR))
        mesh.wall("plain", a, b, (floors * FLOOR, floors * FLOOR + 0.6), (0.45, 0.42, 0.40))

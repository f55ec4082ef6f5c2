"""The highway and the road for U-turns: one long road with several lanes per direction."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from holdover_world.scene.palette import KERB, PAINT, YELLOW, Colour
from holdover_world.simulator.meshes import CAR_COLOURS, Mesh, Solid
from holdover_world.simulator.roads import Lane, Points, arc_lengths, normals, offset
from holdover_world.simulator.scenery import FLOOR, KERB_Z, LEAVES, LINE, PAINT_Z, ROAD_Z, Scene, meadow
from holdover_world.simulator.textures import FACADES, mean_colour

_ROOF: Colour = (0.56, 0.27, 0.22)
_RAIL: Colour = (0.95, 0.96, 0.97)
_LENGTH = 1700.0  # metres


def build_highway(rng: np.random.Generator, radius: float = 700.0) -> Scene:
    """Three lanes per direction through open country, with bends of at least ``radius`` metres."""
    mesh = Mesh()
    line = _winding(rng, radius)
    width, median, lanes = 3.75, 2.0, 3
    edge = median + lanes * width
    meadow(mesh, (-500.0, _LENGTH + 500.0), (-700.0, 700.0))
    for side in (-1, 1):
        span = sorted((side * median / 2, side * (edge + 2.6)))
        mesh.ribbon("asphalt", line, (span[0], span[1]), ROAD_Z, tile=12.0)
        for d in (median, edge):
            _solid(mesh, line, side * d)
        for k in range(1, lanes):
            mesh.dashes(line, side * (median + k * width), PAINT_Z, dash=6.0, gap=9.0, width=LINE)
        _rail(mesh, line, side * (edge + 3.2))
    _rail(mesh, line, 0.0)
    s = 0.0
    while s < _LENGTH - 160.0:  # stretches of noise wall, trees or open land
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


def build_uturn(rng: np.random.Generator) -> Scene:
    """A wide suburban road with two lanes per direction, where cars may turn round from the outer lanes."""
    mesh = Mesh()
    line = np.stack([np.arange(0.0, _LENGTH, 10.0), np.zeros(int(_LENGTH // 10))], axis=1)
    width, median, lanes = 3.6, 1.0, 2
    edge = median + lanes * width + 0.4
    meadow(mesh, (-500.0, _LENGTH + 500.0), (-500.0, 500.0))
    mesh.ribbon("asphalt", line, (-edge, edge), ROAD_Z, tile=12.0)
    mesh.ribbon("plain", line, (-0.22, 0.22), PAINT_Z, YELLOW)
    for side in (-1, 1):
        mesh.dashes(line, side * (median + width), PAINT_Z, dash=4.0, gap=6.0, width=LINE)
        span = sorted((side * edge, side * (edge + 3.0)))
        mesh.ribbon("slabs", line, (span[0], span[1]), KERB_Z, tile=4.0)
        kerb = offset(line, side * edge)
        for a, b in pairwise(kerb):
            mesh.wall("plain", *((a, b) if side > 0 else (b, a)), (0.0, KERB_Z), KERB)
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
    for x in np.arange(200.0, _LENGTH - 200.0, 22.0):
        kind = rng.random()
        y = side * (edge + 13.0)
        if kind < 0.65:
            _cottage(mesh, x, y, FACADES[int(rng.integers(len(FACADES)))])
        elif kind < 0.9:
            for dx in (-5.0, 4.0):
                mesh.tree(x + dx, y, height=8.0, colour=LEAVES[int(rng.integers(2))])
        if rng.random() < 0.5:
            mesh.tree(x + 11.0, side * (edge + 4.6), height=5.5, colour=LEAVES[int(rng.integers(2))])
        if rng.random() < 0.25:
            colour = CAR_COLOURS[int(rng.integers(len(CAR_COLOURS)))]
            mesh.car(x + 9.0, side * (edge + 6.5), side * math.pi / 2, colour)


def _cottage(mesh: Mesh, x: float, y: float, facade: str) -> None:
    half_x, half_y, eaves, ridge = 6.0, 5.0, 6.4, 9.6
    mesh.solids.append(Solid(x, y, 0.0, 2 * half_x, 2 * half_y, 0.0, eaves, mean_colour(facade)))
    for width, bottom, upto in ((1.5, eaves, eaves + 1.6), (0.5, eaves + 1.6, ridge)):
        mesh.solids.append(Solid(x, y, 0.0, 2 * half_x, width * half_y, bottom, upto, _ROOF))
    corners = [(x - half_x, y - half_y), (x + half_x, y - half_y), (x + half_x, y + half_y), (x - half_x, y + half_y)]
    for k in range(4):
        mesh.wall(facade, corners[k], corners[(k + 1) % 4], (0.0, eaves), tile=(4.0, FLOOR))
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


def _winding(rng: np.random.Generator, radius: float) -> Points:
    """A line along +x with bends of at least ``radius`` metres."""
    s = np.arange(0.0, _LENGTH, 10.0)
    phase, wavelength = rng.uniform(0, 2 * math.pi), rng.uniform(500.0, 900.0)
    yaw = np.cumsum(np.sin(2 * math.pi * s / wavelength + phase) / radius * 10.0)
    yaw -= yaw.mean()
    return np.stack([np.cumsum(np.cos(yaw)), np.cumsum(np.sin(yaw))], axis=1) * 10.0


def _parallel_lanes(line: Points, offsets: list[float], limits: tuple[float, ...]) -> list[Lane]:
    """Lanes along a road, first those in the direction of ``line`` (on its right), from the median outwards."""
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
    mesh.ribbon("plain", line, (left - LINE / 2, left + LINE / 2), PAINT_Z, PAINT)


def _rail(mesh: Mesh, line: Points, left: float) -> None:
    """A guard rail, seen from both sides."""
    rail = offset(line, left)
    for a, b in pairwise(rail):
        mesh.solids.append(_along(a, b, 0.1, (0.3, 0.8), _RAIL))
        for start, end in ((a, b), (b, a)):
            mesh.wall("plain", start, end, (0.3, 0.8), _RAIL)


def _noise_wall(mesh: Mesh, line: Points, left: float, side: int) -> None:
    wall = offset(line, left)
    for a, b in pairwise(wall):
        mesh.solids.append(_along(a, b, 0.2, (0.0, 3.6), mean_colour("barrier")))
        mesh.wall("barrier", *((a, b) if side > 0 else (b, a)), (0.0, 3.6), tile=(10.0, 3.6))


def _along(a: Points, b: Points, width: float, z: tuple[float, float], colour: Colour) -> Solid:
    """A thin box from ``a`` to ``b``."""
    (x, y), (dx, dy) = (a + b) / 2, b - a
    return Solid(float(x), float(y), math.atan2(dy, dx), float(np.hypot(dx, dy)), width, *z, colour)


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
        mesh.tree(x, y, height=height, colour=LEAVES[int(rng.integers(2))])

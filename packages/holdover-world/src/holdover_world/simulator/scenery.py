"""Parts that all scenes share: their description, their sizes and the meadow around them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from holdover_world.scene.palette import Colour
from holdover_world.simulator.meshes import Mesh
from holdover_world.simulator.roads import Lane

Point = tuple[float, float]

LEAVES: tuple[Colour, ...] = ((0.27, 0.46, 0.20), (0.36, 0.54, 0.24))
PAINT_Z, ROAD_Z, KERB_Z = 0.03, 0.015, 0.12  # metres: layers far enough apart for the depth buffer
LINE = 0.24  # metres: wider than real lines, which would vanish at 128 pixels
FLOOR = 3.2  # metres: height of a floor and of a facade's tile
_TILE = 120.0  # metres of grass in one piece


@dataclass(kw_only=True)
class Scene:
    """A world to drive in.

    ``starts`` are the places (lane, metres) where an ego may begin. ``span`` is the length in metres of the stretch
    around the ego that has traffic; None if the traffic stays in a closed network of lanes.
    """

    scenario: str
    lanes: list[Lane]
    mesh: Mesh
    starts: list[tuple[int, float]]
    cars: int
    cruise: tuple[float, float]
    span: float | None = None
    opposite: dict[int, int] = field(default_factory=dict)


def meadow(mesh: Mesh, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Grass all around. The tiles are small because the haze is computed at their corners."""
    for low_x in np.arange(x[0], x[1], _TILE):
        for low_y in np.arange(y[0], y[1], _TILE):
            mesh.flat("grass", (low_x, low_x + _TILE), (low_y, low_y + _TILE), -0.05, tile=16.0)

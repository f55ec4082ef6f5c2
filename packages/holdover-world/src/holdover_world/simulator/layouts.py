"""The layout of a simulated scene: its ground as a raster, its boxes, its cars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from holdover_world.scene.layout import METRES, Layout
from holdover_world.scene.palette import GROUNDS
from holdover_world.simulator.meshes import CAR_COLOURS, Solid, car_solids
from holdover_world.simulator.scenery import KERB_Z, Scene
from holdover_world.simulator.traffic import Car

_MARGIN = 4.0  # metres around all roads
_NUMBER = {name: n for n, name in enumerate(GROUNDS)}


def layout_of(scene: Scene, cars: Sequence[Car], poses_TC3: NDArray[np.float32]) -> Layout:
    """The layout of a scene with these cars, which were at these poses (x, y, heading) in each video frame."""
    ground, corner = _ground(scene)
    parts = []
    for number, car in enumerate(cars):
        for solid in car_solids(0.0, 0.0, 0.0, CAR_COLOURS[car.colour], van=car.van):
            parts.append([number, solid.x, 0.0, *_row(solid)[3:]])
    return Layout(
        ground_GH=torch.from_numpy(ground),
        corner_2=torch.tensor(corner),
        boxes_M10=torch.tensor([_row(solid) for solid in scene.mesh.solids], dtype=torch.float32).view(-1, 10),
        parts_J10=torch.tensor(parts, dtype=torch.float32).view(-1, 10),
        poses_TC3=torch.from_numpy(poses_TC3),
    )


def _row(solid: Solid) -> list[float]:
    """A box as a row of `Layout.boxes_M10`."""
    size = solid.length / 2, solid.width / 2
    return [solid.x, solid.y, solid.yaw, *size, solid.bottom, solid.top, *solid.colour]


def _ground(scene: Scene) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    """Everything that lies flat, painted in order of height, and the corner of the area it covers."""
    flat: list[tuple[float, int, NDArray[np.float64]]] = []
    for (material, _, _), quads in scene.mesh.parts.items():
        for quad in quads:
            height = quad[:, 2]
            if material == "grass" or np.ptp(height) > 1e-6 or height[0] > KERB_Z + 0.05:
                continue
            if material == "zebra":
                flat += [(height[0], _NUMBER["asphalt"], quad[:, :2])]
                flat += [(height[0] + 1e-4, _NUMBER["paint"], stripe) for stripe in _stripes(quad)]
            else:
                flat.append((height[0], _number(material, quad[0, 5:8]), quad[:, :2]))
    points = np.concatenate([corners for _, _, corners in flat])
    low, high = points.min(0) - _MARGIN, points.max(0) + _MARGIN
    columns, rows = np.ceil((high - low) / METRES).astype(int).tolist()
    image = Image.new("L", (columns, rows), _NUMBER["grass"])
    draw = ImageDraw.Draw(image)
    for _, number, corners in sorted(flat, key=lambda each: each[0]):
        draw.polygon([tuple(p) for p in ((corners - low) / METRES - 0.5).tolist()], fill=number)
    return np.array(image), (float(low[0]), float(low[1]))


def _number(material: str, colour: NDArray[np.float64]) -> int:
    """The number of a flat face in `GROUNDS`: that of its material, or of the paint with the nearest colour."""
    if material in _NUMBER:
        return _NUMBER[material]
    near = {name: float(np.abs(np.array(GROUNDS[name]) - colour).max()) for name in ("kerb", "paint", "yellow")}
    return _NUMBER[min(near, key=near.__getitem__)]


def _stripes(quad: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """The bright stripes of a zebra crossing: the first half of every whole step of its first texture coordinate."""
    u, corners = quad[:, 3], quad[:, :2]
    # Two sides run along the stripes. The other two, from `a` to `b` and from `d` to `c`, run across them.
    order = [0, 1, 2, 3] if abs(u[1] - u[0]) > abs(u[2] - u[1]) else [1, 2, 3, 0]
    a, b, c, d = corners[order]
    first, last = u[order[0]], u[order[1]]
    found = []
    for n in range(int(np.floor(min(first, last))), int(np.ceil(max(first, last)))):
        ends = np.clip((np.array([n, n + 0.5]) - first) / (last - first), 0, 1)
        if abs(ends[1] - ends[0]) > 1e-6:
            found.append(
                np.stack([a + (b - a) * ends[0], a + (b - a) * ends[1], d + (c - d) * ends[1], d + (c - d) * ends[0]])
            )
    return found

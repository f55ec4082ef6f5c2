"""Cameras on the ego vehicle, and the rig of seven: that of X-World, at one eighth of its size.

Ego coordinates are metres, x forward, y left, z up, with the origin on the ground under the rear axle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

FPS = 12


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera on the ego vehicle.

    Sizes are in pixels. Angles are in degrees; yaw counts to the left, pitch downwards. Positions are in metres, in ego
    coordinates. Cameras of one ``group`` have one size, so a model can stack them as views.
    """

    name: str
    group: str
    width: int
    height: int
    fov: float
    yaw: float
    pitch: float
    position: tuple[float, float, float]


RIG: tuple[Camera, ...] = (
    Camera(name="front_wide", group="front", width=128, height=64, fov=100, yaw=0, pitch=4, position=(2.0, 0.0, 1.5)),
    Camera(name="front_narrow", group="front", width=128, height=64, fov=50, yaw=0, pitch=1, position=(2.0, 0.0, 1.5)),
    Camera(name="left_front", group="side", width=64, height=48, fov=90, yaw=60, pitch=4, position=(1.8, 0.9, 1.3)),
    Camera(name="right_front", group="side", width=64, height=48, fov=90, yaw=-60, pitch=4, position=(1.8, -0.9, 1.3)),
    Camera(name="left_rear", group="side", width=64, height=48, fov=90, yaw=130, pitch=4, position=(1.2, 0.9, 1.3)),
    Camera(name="right_rear", group="side", width=64, height=48, fov=90, yaw=-130, pitch=4, position=(1.2, -0.9, 1.3)),
    Camera(name="rear", group="rear", width=112, height=48, fov=100, yaw=180, pitch=4, position=(-0.8, 0.0, 1.4)),
)


def enlarged(rig: tuple[Camera, ...], times: int) -> tuple[Camera, ...]:
    """The same rig with the width and height of its pictures multiplied."""
    return tuple(replace(camera, width=camera.width * times, height=camera.height * times) for camera in rig)


def camera_rays(camera: Camera, *, every: int = 1) -> NDArray[np.float64]:
    """Rays in ego coordinates through the centre of each square of ``every`` pixels: ``[rows, columns, 3]``.

    Their component along the viewing axis is 1. Squares may reach beyond the lower and right edges.
    """
    focal = camera.width / 2 / math.tan(math.radians(camera.fov) / 2)
    right = (np.arange(math.ceil(camera.width / every)) + 0.5) * every - camera.width / 2
    down = (np.arange(math.ceil(camera.height / every)) + 0.5) * every - camera.height / 2
    v, u = np.meshgrid(down / focal, right / focal, indexing="ij")
    return np.stack([u, v, np.ones_like(u)], -1) @ camera_axes(camera)


def camera_axes(camera: Camera) -> NDArray[np.float64]:
    """The axes of a camera in ego coordinates: right, down and forward, the rows of ``[3, 3]``."""
    pitch, yaw = math.radians(camera.pitch), math.radians(camera.yaw)
    right = math.sin(yaw), -math.cos(yaw), 0.0
    down = -math.sin(pitch) * math.cos(yaw), -math.sin(pitch) * math.sin(yaw), -math.cos(pitch)
    forward = math.cos(pitch) * math.cos(yaw), math.cos(pitch) * math.sin(yaw), -math.sin(pitch)
    return np.array([right, down, forward])


#: Camera names of the stitched view, row by row. Rows narrower than the widest are centred.
STITCH_ROWS: tuple[tuple[str, ...], ...] = (
    ("front_wide", "front_narrow"),
    ("left_rear", "left_front", "right_front", "right_rear"),
    ("rear",),
)


def stitch(frames: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Lay the pictures of a rig out on one canvas, for people and for stitched metrics.

    Args:
        frames: per camera name an array ``[..., height, width, channels]`` of one dtype.

    Returns:
        ``[..., 160, 256, channels]`` for the full rig, zero where there is no camera. Cameras outside the rig come
        below, each in its own row.
    """
    known = {name for names in STITCH_ROWS for name in names}
    rows = []
    for names in (*STITCH_ROWS, *((name,) for name in frames if name not in known)):
        present = [frames[name] for name in names if name in frames]
        if present:
            rows.append(np.concatenate(present, axis=-2))
    width = max(row.shape[-2] for row in rows)
    padded = []
    for row in rows:
        left = (width - row.shape[-2]) // 2
        padding = [(0, 0)] * row.ndim
        padding[-2] = (left, width - row.shape[-2] - left)
        padded.append(np.pad(row, padding))
    return np.concatenate(padded, axis=-3)

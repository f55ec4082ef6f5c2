"""What stands in the car's way, measured in a depth image of a camera on it."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from holdover_world.config import camera_rays
from holdover_world.scene.cameras import Camera
from holdover_world.scene.vehicles import LENGTH, REAR_TO_CENTRE, WIDTH

_BUMPER = REAR_TO_CENTRE + LENGTH / 2  # metres ahead of the rear axle
_LOWEST, _HIGHEST = 0.4, 2.0  # metres above the ground: over kerbs and what depth is off by there, under signs
_SUPPORT = 4  # pixels that must see a thing: fewer are noise


def gap_ahead(depth: NDArray[np.floating], camera: Camera, *, curvature: float = 0.0) -> float:
    """Metres from the front bumper to the nearest thing that the car would touch if it drove on along its circle.

    Args:
        depth: of the camera, metres along its viewing axis ``[height, width]``.
        camera: where it is and how it looks.
        curvature: of the circle, 1/m.

    Returns:
        Infinity where nothing is seen on the way; zero or less where something is inside the car's front.

    Raises:
        ValueError: the image is not of the camera's size.
    """
    if depth.shape != (camera.height, camera.width):
        raise ValueError(f"depth is {depth.shape}, give ({camera.height}, {camera.width}), as {camera.name} sees it")
    x, y, z = np.moveaxis(depth[..., None] * _rays(camera) + np.array(camera.position), -1, 0)
    solid = (z > _LOWEST) & (z < _HIGHEST)
    gaps = _gaps(x[solid], y[solid], curvature)
    met = gaps[np.isfinite(gaps)]
    return float(np.partition(met, _SUPPORT - 1)[_SUPPORT - 1]) if met.size >= _SUPPORT else float("inf")


def time_to_collision(gap: float, speed: float) -> float:
    """Seconds to cross ``gap`` metres at ``speed`` m/s: what is ahead is taken to stand, for one image cannot tell.

    For a car ahead that drives as fast this is the time headway, which the two-second rule is about.
    """
    return max(gap, 0.0) / speed if speed > 0 else (float("inf") if gap > 0 else 0.0)


def _gaps(x: NDArray[np.floating], y: NDArray[np.floating], curvature: float) -> NDArray[np.floating]:
    """Metres that the rear axle drives until the car touches points ``x``, ``y``; infinite where it never does."""
    side = WIDTH / 2
    inside = (x > 0) & (x < _BUMPER) & (np.abs(y) < side)
    if abs(curvature) < 1e-6:
        return np.where((np.abs(y) < side) & (x > 0), x - _BUMPER, np.inf)
    # Around the middle of the circle, at a point's radius: its angle, and that of the foremost part of the car. That is
    # the bumper, or farther in, where the bumper does not reach, the flank.
    centre = 1 / abs(curvature)
    across = centre - y * np.sign(curvature)
    radius, inner = np.hypot(x, across), centre - side
    foremost = np.minimum(_BUMPER, np.sqrt(np.maximum(radius**2 - inner**2, 0)))
    angle = np.arctan2(x, across) - np.arctan2(foremost, np.sqrt(radius**2 - foremost**2))
    swept = (radius > inner) & (radius < np.hypot(_BUMPER, centre + side)) & (angle >= 0)
    return np.where(inside, x - _BUMPER, np.where(swept, angle * centre, np.inf))


@cache
def _rays(camera: Camera) -> NDArray[np.float64]:
    return camera_rays(camera)

"""The distance to the next obstacle, measured in a depth image of a camera on the car."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from holdover_world.scene.cameras import Camera, camera_rays
from holdover_world.scene.vehicles import LENGTH, REAR_TO_CENTRE, WIDTH

_BUMPER = REAR_TO_CENTRE + LENGTH / 2  # metres ahead of the rear axle
_LOWEST, _HIGHEST = 0.4, 2.0  # metres above the ground: above kerbs and errors of depth, below signs
_SUPPORT = 4  # an obstacle covers at least this many pixels; fewer are noise


def gap_ahead(depth: NDArray[np.floating], camera: Camera, *, curvature: float = 0.0) -> float:
    """Metres from the front bumper to the nearest obstacle on the circle that the car follows.

    Args:
        depth: metres along the camera's viewing axis, ``[height, width]``.
        camera: the camera that saw it.
        curvature: of the circle, 1/m, positive to the left.

    Returns:
        Infinity if the way is free; zero or less if an obstacle is inside the front of the car.

    Raises:
        ValueError: the image does not have the camera's size.
    """
    if depth.shape != (camera.height, camera.width):
        raise ValueError(f"depth is {depth.shape}; give ({camera.height}, {camera.width}), the size of {camera.name}")
    x, y, z = np.moveaxis(depth[..., None] * _rays(camera) + np.array(camera.position), -1, 0)
    solid = (z > _LOWEST) & (z < _HIGHEST)
    gaps = _gaps(x[solid], y[solid], curvature)
    met = gaps[np.isfinite(gaps)]
    return float(np.partition(met, _SUPPORT - 1)[_SUPPORT - 1]) if met.size >= _SUPPORT else float("inf")


def time_to_collision(gap: float, speed: float) -> float:
    """Seconds to cross ``gap`` metres at ``speed`` m/s, as if the obstacle stood still: one image shows no motion.

    For a car ahead of the same speed this is the time headway, the quantity of the two-second rule.
    """
    return max(gap, 0.0) / speed if speed > 0 else (float("inf") if gap > 0 else 0.0)


def _gaps(x: NDArray[np.floating], y: NDArray[np.floating], curvature: float) -> NDArray[np.floating]:
    """Metres that the rear axle drives until the car touches points ``x``, ``y``; infinite where it never does."""
    side = WIDTH / 2
    inside = (x > 0) & (x < _BUMPER) & (np.abs(y) < side)
    if abs(curvature) < 1e-6:
        return np.where((np.abs(y) < side) & (x > 0), x - _BUMPER, np.inf)
    # Polar coordinates around the centre of the circle. At a point's radius, compare its angle with that of the car's
    # foremost part: the bumper, or the flank at radii that the bumper does not reach.
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

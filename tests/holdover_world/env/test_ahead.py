"""The gap ahead in scenes of known depth, for a car moved step by step, and in the depth of the simulator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from holdover_world.env.ahead import gap_ahead, time_to_collision
from holdover_world.scene.cameras import RIG, Camera
from holdover_world.scene.vehicles import LENGTH, REAR_TO_CENTRE, WIDTH, EgoState

CAMERA = Camera(
    name="level", group="front", width=128, height=64, fov=90, yaw=0, pitch=0, position=(2.0, 0.0, 1.5)
)  # fmt: skip
BUMPER = 3.65  # metres ahead of the rear axle: 1.4 to the middle of the car, and half of its 4.5


def seen(*boxes: tuple[float, float, float, float, float]) -> NDArray[np.float64]:
    """Depth of flat ground with panels across the view, each (x, from y, to y, from z, to z)."""
    column, row = (np.arange(128) + 0.5 - 64) / 64, (np.arange(64) + 0.5 - 32) / 64
    right, down = np.meshgrid(column, row)
    depth = np.where(down > 0, 1.5 / np.where(down > 0, down, 1), 655.35)
    for x, right_edge, left_edge, low, high in boxes:
        ahead = x - 2.0
        hit = (-ahead * right >= right_edge) & (-ahead * right <= left_edge)
        hit &= (1.5 - ahead * down >= low) & (1.5 - ahead * down <= high)
        depth = np.where(hit, np.minimum(depth, ahead), depth)
    return depth


def test_the_gap_is_from_the_bumper_to_the_nearest_obstacle() -> None:
    assert BUMPER == REAR_TO_CENTRE + LENGTH / 2
    assert gap_ahead(seen(), CAMERA) == math.inf
    assert gap_ahead(seen((20.0, -5, 5, 0, 3)), CAMERA) == pytest.approx(20.0 - BUMPER)
    assert gap_ahead(seen((20.0, -5, 5, 0, 3), (12.0, 0.5, 3, 0, 3)), CAMERA) == pytest.approx(12.0 - BUMPER)
    beside = (12.0, 1.0, 4, 0, 3)
    assert gap_ahead(seen((20.0, -5, 5, 0, 3), beside), CAMERA) == pytest.approx(20.0 - BUMPER)
    for harmless in ((8.0, -5, 5, 0, 0.2), (15.0, -5, 5, 2.5, 6)):  # a kerb, a sign over the road
        assert gap_ahead(seen(harmless), CAMERA) == math.inf
    assert gap_ahead(seen((3.0, -0.5, 0.5, 0, 1.4)), CAMERA) == pytest.approx(3.0 - BUMPER)  # it is hit


def test_a_few_wrong_pixels_are_no_obstacle() -> None:
    depth = seen((20.0, -5, 5, 0, 3))
    depth[30, 62:65] = 4.0
    depth[10] = np.nan
    assert gap_ahead(depth, CAMERA) == pytest.approx(20.0 - BUMPER)


def first_touch(x: float, left_edge: float, right_edge: float, curvature: float) -> float:
    """Metres that the rear axle drives along its circle, in steps, until the car's outline meets a panel."""
    y = np.linspace(right_edge, left_edge, 200)
    for driven in np.arange(0, 40, 0.01):
        yaw = driven * curvature
        dx, dy = x - math.sin(yaw) / curvature, y - (1 - math.cos(yaw)) / curvature
        forward, left = dx * math.cos(yaw) + dy * math.sin(yaw), dy * math.cos(yaw) - dx * math.sin(yaw)
        if ((forward > 0) & (forward < BUMPER) & (np.abs(left) < WIDTH / 2)).any():
            return float(driven)
    return math.inf


@pytest.mark.parametrize("curvature", [1e-4, 0.03, -0.03, 0.12, -0.12])
@pytest.mark.parametrize(("x", "right", "left"), [(16, -4, 1.5), (10, 0.6, 6), (9, -6, -1.2), (6, 0.7, 2)])
def test_in_a_bend_the_gap_is_along_the_circle(curvature: float, x: float, right: float, left: float) -> None:
    gap = gap_ahead(seen((x, right, left, 0, 3)), CAMERA, curvature=curvature)
    assert gap == pytest.approx(first_touch(x, left, right, curvature), abs=0.5)  # a pixel at 16 m is 0.22 m wide


@pytest.mark.parametrize(
    ("gap", "speed", "seconds"),
    [(20.0, 10.0, 2.0), (20.0, 0.0, math.inf), (-0.2, 5.0, 0.0), (-0.2, 0.0, 0.0), (math.inf, 9.0, math.inf)],
)
def test_the_time_is_gap_over_speed(gap: float, speed: float, seconds: float) -> None:
    assert time_to_collision(gap, speed) == seconds


def test_a_depth_image_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depth is \(48, 64\); give \(64, 128\), the size of level"):
        gap_ahead(np.ones((48, 64)), CAMERA)


def test_the_simulators_depth_gives_the_gap_to_the_car_ahead() -> None:
    pytest.importorskip("panda3d", reason="rendering needs Panda3D: make simulator")
    from holdover_world.simulator.meshes import Mesh
    from holdover_world.simulator.render import CarPose, Renderer

    try:
        renderer: Any = Renderer()
    except RuntimeError as error:
        pytest.skip(str(error))
    mesh = Mesh()
    mesh.flat("plain", (-900.0, 900.0), (-900.0, 900.0), 0.0)
    for x, y in ((8.0, 0.0), (15.0, 0.5), (30.0, -0.8), (12.0, 2.5), (6.0, 0.0)):
        car = CarPose(x, y, 0.0, 0, False)
        renderer.load(mesh, [car])
        depth = renderer.render(EgoState(), [car])[1]["front_wide"]
        expected = x - LENGTH / 2 - BUMPER if abs(y) < WIDTH else math.inf
        assert gap_ahead(depth, RIG[0]) == pytest.approx(expected, abs=0.15)
    renderer.close()

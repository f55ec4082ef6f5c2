"""The driving simulator: a scene, its traffic, the ego, and the pictures of seven cameras. Needs Panda3D."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdover.world.cameras import FPS
from holdover.world.driver import Driver
from holdover.world.render import CarPose, Renderer
from holdover.world.scenes import build_scene
from holdover.world.traffic import Traffic
from holdover.world.vehicles import EgoState, drive


@dataclass(frozen=True)
class RigFrame:
    """One instant: per camera ``rgb`` uint8 ``[H, W, 3]`` and ``depth`` float32 ``[H, W]`` in metres along the viewing
    axis (``render.SKY_DEPTH`` for the sky), and the ego in world coordinates."""

    rgb: dict[str, NDArray[np.uint8]]
    depth: dict[str, NDArray[np.float32]]
    ego: EgoState


class Simulator:
    """Drive through one seeded scene, frame by frame at ``FPS``.

    The same seed and commands give the same poses and pixels on one machine. Pass a ``renderer`` to share it between
    simulators that are used one after another; otherwise each opens its own.

    Raises:
        ImportError: on import of this module if Panda3D is missing.
        ValueError: if there is no such scenario.
    """

    def __init__(self, scenario: str, seed: int, *, renderer: Renderer | None = None) -> None:
        self._seed = seed
        self._scene = build_scene(scenario, seed)
        self._own_renderer = renderer is None
        self._renderer = renderer or Renderer()
        self.reset()

    def reset(self) -> RigFrame:
        """Go back to the beginning and return its picture."""
        rng = np.random.default_rng([self._seed, 2])
        start = self._scene.starts[int(rng.integers(len(self._scene.starts)))]
        lane = self._scene.lanes[start[0]]
        x, y = (float(np.interp(start[1], lane.arc, lane.points[:, k])) for k in (0, 1))
        ahead = [float(np.interp(start[1] + 1.0, lane.arc, lane.points[:, k])) for k in (0, 1)]
        speed = (
            float(rng.uniform(0.5, 1.0) * self._scene.cruise[1])
            if rng.random() < 0.8 or self._scene.scenario == "highway"
            else 0.0
        )
        self._ego = EgoState(x=x, y=y, yaw=math.atan2(ahead[1] - y, ahead[0] - x), speed=speed)
        self._traffic = Traffic(self._scene, self._ego, rng)
        self.driver = Driver(self._scene, start, np.random.default_rng([self._seed, 3]))
        self._renderer.load(self._scene.mesh, self._poses())
        return self._look()

    @property
    def ego(self) -> EgoState:
        """The ego now."""
        return self._ego

    @property
    def traffic(self) -> Traffic:
        """The other cars now."""
        return self._traffic

    def command(self) -> tuple[float, float]:
        """What the scripted driver commands now, for ``driver.HOLD`` steps: speed (m/s) and curvature (1/m)."""
        return self.driver.command(self._ego, self._traffic)

    def step(self, speed_command: float, curvature_command: float) -> RigFrame:
        """Move on by one frame under a command (m/s and 1/m, clipped to their bounds) and look."""
        self._ego = drive(self._ego, speed_command, curvature_command)
        self._traffic.step(self._ego, 1 / FPS)
        return self._look()

    def close(self) -> None:
        """Free the renderer, unless it is shared."""
        if self._own_renderer:
            self._renderer.close()

    def _look(self) -> RigFrame:
        rgb, depth = self._renderer.render(self._ego, self._poses())
        return RigFrame(rgb, depth, self._ego)

    def _poses(self) -> Iterator[CarPose]:
        return (CarPose(car.x, car.y, car.yaw, car.colour, car.van) for car in self._traffic.cars)

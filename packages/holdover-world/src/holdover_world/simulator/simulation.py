"""The driving simulator without pictures: a scene, its traffic, the ego and its scripted driver."""

from __future__ import annotations

import math

import numpy as np

from holdover_world.scene.cameras import FPS
from holdover_world.scene.layout import Layout
from holdover_world.scene.vehicles import EgoState, drive
from holdover_world.simulator.driver import Driver
from holdover_world.simulator.layouts import layout_of
from holdover_world.simulator.scenes import build_scene
from holdover_world.simulator.traffic import Traffic


class Simulation:
    """One seeded scene and everything that moves in it, frame by frame at ``FPS``.

    Raises:
        ValueError: there is no such scenario.
    """

    def __init__(self, scenario: str, seed: int) -> None:
        self._seed = seed
        self.scene = build_scene(scenario, seed)
        self.reset()

    def reset(self) -> None:
        """Go back to the beginning."""
        rng = np.random.default_rng([self._seed, 2])
        start = self.scene.starts[int(rng.integers(len(self.scene.starts)))]
        lane = self.scene.lanes[start[0]]
        x, y = (float(np.interp(start[1], lane.arc, lane.points[:, k])) for k in (0, 1))
        ahead = [float(np.interp(start[1] + 1.0, lane.arc, lane.points[:, k])) for k in (0, 1)]
        speed = (
            float(rng.uniform(0.5, 1.0) * self.scene.cruise[1])
            if rng.random() < 0.8 or self.scene.scenario == "highway"
            else 0.0
        )
        self.ego = EgoState(x=x, y=y, yaw=math.atan2(ahead[1] - y, ahead[0] - x), speed=speed)
        self.traffic = Traffic(self.scene, self.ego, rng)
        self.driver = Driver(self.scene, start, np.random.default_rng([self._seed, 3]))
        self._log = [self._poses()]

    def command(self) -> tuple[float, float]:
        """The present command of the scripted driver, for ``driver.HOLD`` steps: speed (m/s) and curvature (1/m)."""
        return self.driver.command(self.ego, self.traffic)

    def step(self, speed_command: float, curvature_command: float) -> None:
        """Advance by one frame under a command (m/s and 1/m, clipped to their bounds)."""
        self.ego = drive(self.ego, speed_command, curvature_command)
        self.traffic.step(self.ego, 1 / FPS)
        self._log.append(self._poses())

    def layout(self) -> Layout:
        """The map, and where the cars have been since the beginning."""
        return layout_of(self.scene, self.traffic.cars, np.array(self._log, dtype=np.float32))

    def _poses(self) -> list[tuple[float, float, float]]:
        return [(car.x, car.y, car.yaw) for car in self.traffic.cars]

"""The driving simulator: a scene, its traffic, the ego, and the pictures of seven cameras. Needs Panda3D."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdover_world.scene.layout import Layout
from holdover_world.scene.vehicles import EgoState
from holdover_world.simulator.driver import Driver
from holdover_world.simulator.render import CarPose, Renderer
from holdover_world.simulator.simulation import Simulation
from holdover_world.simulator.traffic import Traffic


@dataclass(frozen=True)
class RigFrame:
    """One instant.

    Attributes:
        rgb: per camera uint8 ``[H, W, 3]``.
        depth: per camera float32 ``[H, W]``, metres along the viewing axis, ``render.SKY_DEPTH`` for the sky.
        ego: the ego in world coordinates.
    """

    rgb: dict[str, NDArray[np.uint8]]
    depth: dict[str, NDArray[np.float32]]
    ego: EgoState


class Simulator:
    """Drive through one seeded scene, frame by frame at ``FPS``.

    The same seed and commands give the same poses and pixels on one machine. Simulators that are used one after another
    can share a ``renderer``; without one, each opens its own.

    Raises:
        ImportError: on import of this module, if Panda3D is missing.
        ValueError: there is no such scenario.
    """

    def __init__(self, scenario: str, seed: int, *, renderer: Renderer | None = None) -> None:
        self._simulation = Simulation(scenario, seed)
        self._own_renderer = renderer is None
        self._renderer = renderer or Renderer()
        self.reset()

    def reset(self) -> RigFrame:
        """Go back to the beginning and return its picture."""
        self._simulation.reset()
        self._renderer.load(self._simulation.scene.mesh, self._poses())
        return self._look()

    @property
    def ego(self) -> EgoState:
        """The ego now."""
        return self._simulation.ego

    @property
    def traffic(self) -> Traffic:
        """The other cars now."""
        return self._simulation.traffic

    @property
    def driver(self) -> Driver:
        """The scripted driver of the ego."""
        return self._simulation.driver

    def command(self) -> tuple[float, float]:
        """The present command of the scripted driver, for ``driver.HOLD`` steps: speed (m/s) and curvature (1/m)."""
        return self._simulation.command()

    def step(self, speed_command: float, curvature_command: float) -> RigFrame:
        """Advance by one frame under a command (m/s and 1/m, clipped to their bounds) and return its pictures."""
        self._simulation.step(speed_command, curvature_command)
        return self._look()

    def layout(self) -> Layout:
        """The map, and where the cars have been since the beginning."""
        return self._simulation.layout()

    def close(self) -> None:
        """Free the renderer, unless it is shared."""
        if self._own_renderer:
            self._renderer.close()

    def _look(self) -> RigFrame:
        rgb, depth = self._renderer.render(self.ego, self._poses())
        return RigFrame(rgb, depth, self.ego)

    def _poses(self) -> Iterator[CarPose]:
        return (CarPose(car.x, car.y, car.yaw, car.colour, car.van) for car in self.traffic.cars)

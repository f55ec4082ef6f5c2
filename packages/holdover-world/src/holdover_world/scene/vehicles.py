"""How cars move: the ego's kinematic bicycle, its action, and the car-following rule of the traffic.

The *action* is the command of a driver: a speed in m/s and a curvature in 1/m (positive turns left). Their bounds are
defined here and nowhere else. ``normalise_action`` maps them to [-1, 1]; zero means "stand still, straight".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdover_world.scene.cameras import FPS

MAX_SPEED = 30.0  # m/s; the ego does not reverse
MAX_CURVATURE = 0.2  # 1/m: a turning radius of 5 m
MAX_ACCELERATION = 3.0  # m/s^2
MAX_BRAKING = 8.0  # m/s^2
MAX_CURVATURE_RATE = 0.3  # 1/m per second
MAX_LATERAL_ACCELERATION = 6.0  # m/s^2: what the tyres hold; limits the curvature at speed
WHEELBASE = 2.8  # m
LENGTH, WIDTH = 4.5, 1.8  # m, the same for every car
REAR_TO_CENTRE = 1.4  # m, from the rear axle, where the ego's pose is measured, to the middle of the car

# Curvature is scaled by asinh. A lane change at 25 m/s commands 0.004 1/m. On a linear scale that is 2 % of a U-turn's
# action, too little for a model or a cache's gate to notice.
_CURVATURE_KNEE = 0.01  # 1/m
_SUBSTEPS = 4


def normalise_action(speed: ArrayLike, curvature: ArrayLike) -> NDArray[np.float32]:
    """Map commanded speed (m/s) and curvature (1/m) to the model's action.

    Returns:
        float32 ``[..., 2]``: speed in [0, 1] and curvature in [-1, 1]. Commands out of bounds are clipped first.
    """
    bounded_speed = np.clip(np.asarray(speed, dtype=np.float64), 0.0, MAX_SPEED)
    bounded_curvature = np.clip(np.asarray(curvature, dtype=np.float64), -MAX_CURVATURE, MAX_CURVATURE)
    turn = np.arcsinh(bounded_curvature / _CURVATURE_KNEE) / math.asinh(MAX_CURVATURE / _CURVATURE_KNEE)
    return np.stack(np.broadcast_arrays(bounded_speed / MAX_SPEED, turn), axis=-1).astype(np.float32)


def denormalise_action(action: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The reverse of `normalise_action`: from ``[..., 2]`` to speed (m/s) and curvature (1/m), each ``[...]``."""
    speed, turn = np.moveaxis(np.asarray(action, dtype=np.float64), -1, 0)
    return speed * MAX_SPEED, np.sinh(turn * math.asinh(MAX_CURVATURE / _CURVATURE_KNEE)) * _CURVATURE_KNEE


@dataclass(frozen=True, kw_only=True)
class EgoState:
    """Where the ego is and how it moves: metres, radians (yaw counts to the left from +x), m/s, 1/m.

    The position is the point on the ground under the rear axle.
    """

    x: float = 0.0
    y: float = 0.0
    yaw: float = 0.0
    speed: float = 0.0
    curvature: float = 0.0

    @property
    def steering_angle(self) -> float:
        """Angle of the front wheels in radians."""
        return math.atan(WHEELBASE * self.curvature)

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the car, in metres."""
        return self.x + REAR_TO_CENTRE * math.cos(self.yaw), self.y + REAR_TO_CENTRE * math.sin(self.yaw)


def drive(state: EgoState, speed_command: float, curvature_command: float, *, dt: float = 1 / FPS) -> EgoState:
    """Move the kinematic bicycle by ``dt`` seconds under one command; commands out of bounds are clipped.

    Speed and curvature approach the command at bounded rates. Curvature is also limited by the grip of the tyres.
    """
    speed_command = _clip(speed_command, 0.0, MAX_SPEED)
    curvature_command = _clip(curvature_command, -MAX_CURVATURE, MAX_CURVATURE)
    for _ in range(_SUBSTEPS):
        state = _substep(state, speed_command, curvature_command, dt / _SUBSTEPS)
    return state


def _substep(state: EgoState, speed_command: float, curvature_command: float, dt: float) -> EgoState:
    speed = state.speed + _clip(speed_command - state.speed, -MAX_BRAKING * dt, MAX_ACCELERATION * dt)
    change = MAX_CURVATURE_RATE * dt
    curvature = state.curvature + _clip(curvature_command - state.curvature, -change, change)
    grip = MAX_LATERAL_ACCELERATION / max(speed, 1e-3) ** 2
    curvature = _clip(curvature, -grip, grip)
    # Mean speed and curvature are exact for constant rates, the chord of the arc for constant curvature.
    distance = (state.speed + speed) / 2 * dt
    turn = (state.curvature + curvature) / 2 * distance
    chord = distance * float(np.sinc(turn / 2 / math.pi))
    heading = state.yaw + turn / 2
    return replace(
        state,
        x=state.x + chord * math.cos(heading),
        y=state.y + chord * math.sin(heading),
        yaw=state.yaw + turn,
        speed=speed,
        curvature=curvature,
    )


def follow(
    speed: ArrayLike, desired: ArrayLike, gap: ArrayLike, leader_speed: ArrayLike, *, headway: float = 1.3
) -> NDArray[np.float64]:
    """Acceleration in m/s^2 of the intelligent driver model (Treiber et al., 2000).

    Args:
        speed, desired, leader_speed: m/s.
        gap: metres to the car ahead, bumper to bumper; infinite when the road is free.
        headway: seconds of distance that are kept to the car ahead.
    """
    acceleration, comfort, standstill = 2.2, 2.5, 2.5
    speed = np.asarray(speed, dtype=np.float64)
    closing = speed - np.asarray(leader_speed)
    wanted_gap = standstill + np.maximum(
        0.0, speed * headway + speed * closing / (2 * math.sqrt(acceleration * comfort))
    )
    free = 1 - (speed / np.maximum(desired, 0.1)) ** 4
    crowded = (wanted_gap / np.maximum(gap, 0.2)) ** 2
    bounded: NDArray[np.float64] = np.clip(acceleration * (free - crowded), -MAX_BRAKING, acceleration)
    return bounded


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)

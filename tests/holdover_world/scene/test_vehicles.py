"""The ego against closed forms, and the car-following rule at its limits."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdover_world.scene.cameras import FPS
from holdover_world.scene.vehicles import (
    LENGTH,
    MAX_ACCELERATION,
    MAX_BRAKING,
    MAX_CURVATURE,
    MAX_LATERAL_ACCELERATION,
    MAX_SPEED,
    EgoState,
    denormalise_action,
    drive,
    follow,
    normalise_action,
)


def test_constant_curvature_draws_a_circle() -> None:
    curvature, speed, frames = 0.05, 6.0, 60
    state = EgoState(speed=speed, curvature=curvature)
    for _ in range(frames):
        state = drive(state, speed, curvature)
    angle = curvature * speed * frames / FPS
    assert (state.x, state.y) == pytest.approx((math.sin(angle) / curvature, (1 - math.cos(angle)) / curvature))
    assert state.yaw == pytest.approx(angle)


def test_braking_distance() -> None:
    state = EgoState(speed=20.0)
    while state.speed > 0:
        state = drive(state, 0.0, 0.0)
    # The last substep ends early, at standstill.
    assert state.x == pytest.approx(20.0**2 / (2 * MAX_BRAKING), abs=0.02)
    assert drive(state, 0.0, 0.1).x == state.x


def test_acceleration_and_steering_take_time() -> None:
    state = drive(EgoState(), MAX_SPEED, MAX_CURVATURE)
    assert state.speed == pytest.approx(MAX_ACCELERATION / FPS)
    assert 0 < state.curvature < MAX_CURVATURE


def test_tyres_bound_the_curvature() -> None:
    state = EgoState(speed=25.0)
    for _ in range(20):
        state = drive(state, 25.0, MAX_CURVATURE)
    assert state.curvature * state.speed**2 == pytest.approx(MAX_LATERAL_ACCELERATION)


def test_positive_curvature_turns_left() -> None:
    state = EgoState(speed=5.0)
    for _ in range(12):
        state = drive(state, 5.0, 0.1)
    assert state.y > 0
    assert state.steering_angle > 0


@given(st.floats(0, MAX_SPEED), st.floats(-MAX_CURVATURE, MAX_CURVATURE))
def test_actions_normalise_and_back(speed: float, curvature: float) -> None:
    action = normalise_action(speed, curvature)
    assert action.dtype == np.float32
    assert 0 <= action[0] <= 1
    assert -1 <= action[1] <= 1
    back = denormalise_action(action)
    assert back[0] == pytest.approx(speed, abs=1e-4)
    assert back[1] == pytest.approx(curvature, abs=1e-6)


def test_standing_still_is_the_zero_action_and_bounds_clip() -> None:
    assert normalise_action(0.0, 0.0).tolist() == [0.0, 0.0]
    assert normalise_action([-5.0, 99.0], [-9.0, 9.0]).tolist() == [[0.0, -1.0], [1.0, 1.0]]


def test_followers_stop_behind_a_standing_car() -> None:
    position, speed = 0.0, 15.0
    for _ in range(30 * FPS):
        acceleration = float(follow(speed, 15.0, 80.0 - position - LENGTH, 0.0))
        speed = max(0.0, speed + acceleration / FPS)
        position += speed / FPS
    assert speed < 0.1
    assert 0.5 < 80.0 - position - LENGTH < 5.0


def test_a_free_road_is_driven_at_the_desired_speed() -> None:
    assert float(follow(10.0, 10.0, math.inf, 0.0)) == pytest.approx(0.0)
    assert float(follow(5.0, 10.0, math.inf, 0.0)) > 0

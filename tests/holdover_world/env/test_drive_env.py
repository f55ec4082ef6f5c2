"""The environment: Gymnasium's own checker, the geometry against closed forms, the batch against single cars."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from holdover_world.env.drive_env import Course, DriveEnv, DriveVectorEnv, road_of
from holdover_world.scene.vehicles import EgoState, normalise_action
from holdover_world.server import drive_env, session
from holdover_world.simulator.scenes import SCENARIOS
from tests.holdover_world.env.small import small_course, straight


@pytest.fixture
def course() -> Course:
    return small_course()


def test_gymnasium_finds_no_fault(course: Course) -> None:
    env = gymnasium.make("holdover/Drive-v1", course=course, render_mode="rgb_array")
    check_env(env.unwrapped, skip_close_check=True)
    assert env.observation_space["rear"].shape == (16, 16, 3)  # type: ignore[index]
    env.close()


def test_offsets_are_those_of_the_nearest_lane_that_leads_the_same_way() -> None:
    road = straight(EgoState())
    assert road.beside(EgoState(x=50.3, y=0.7, yaw=0.1)) == pytest.approx((0.7, 0.1))
    assert road.beside(EgoState(x=50.3, y=2.9, yaw=0.0)) == pytest.approx((2.9, 0.0))  # the nearer lane leads back
    assert road.beside(EgoState(x=50.3, y=2.9, yaw=math.pi + 0.2)) == pytest.approx((0.6, 0.2))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_shipped_clips_begin_in_a_lane(scenario: str) -> None:
    offset, heading_error = (road := road_of(scenario, 32)).beside(road.start)
    assert abs(offset) < 1.75
    assert abs(heading_error) < 0.35


def test_the_reward_is_progress_along_the_middle(course: Course) -> None:
    env = DriveEnv(scenario="coast", course=course)
    observation, info = env.reset(seed=1)
    assert info["offset"] == pytest.approx(0.5)
    observation, reward, terminated, truncated, info = env.step(normalise_action(5.0, 0.0))
    assert (terminated, truncated) == (False, False)
    assert info["x"] == pytest.approx(5.0 * 4 / 12)  # four frames of a twelfth of a second
    assert reward == pytest.approx(5 / 30 * (1 - (0.5 / 1.75) ** 2), rel=1e-4)
    assert observation["ego"] == pytest.approx([5.0, 0.0], abs=1e-4)
    assert observation["lane"] == pytest.approx([0.5, 0.0], abs=1e-4)
    assert observation["front_wide"].any()
    for _ in range(20):
        observation, reward, terminated, _, info = env.step(normalise_action(10.0, 0.1))
        if terminated:
            break
    assert terminated
    assert reward == -1
    assert info["offset"] > 1.75
    assert observation["lane"] == pytest.approx([1.75, info["heading_error"]])


@pytest.mark.parametrize("wall", [math.inf, 30.0, 10.0, 4.0, 3.0])
def test_what_depth_shows_ahead_costs_and_ends(course: Course, wall: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # A wall so many metres before the rear axle in the newest frame, and at half that distance in the one before.
    newest = np.full((64, 128), min(wall - 2.0, 600.0), np.float32)
    depth = {"front_wide": np.stack([newest / 2, newest]), "rear": np.ones((2, 16, 16), np.float32)}

    def advance(*arguments: Any) -> list[Any]:
        return [replace(made, depth=depth) for made in session.advance(*arguments)]

    monkeypatch.setattr(drive_env, "advance", advance)
    batch, single = DriveVectorEnv(scenario="town", course=course), DriveEnv(scenario="town", course=course)
    for env, car in ((batch, batch._cars[0]), (single, single._car)):
        env.reset(seed=1)
        assert car.ahead is not None
        assert car.ahead.name == "front_wide"
        car.ahead = replace(car.ahead, pitch=0.0, width=128, height=64)
    step = single._car.session.step
    monkeypatch.setattr(single._car.session, "step", lambda action: replace(step(action), depth=depth))
    action = normalise_action(10.0, 0.0)
    _, reward, terminated, truncated, info = single.step(action)
    if wall > 3.65:
        seconds = (wall - 3.65) / 10.0
        assert reward == pytest.approx(10 / 30 * min(1.0, seconds / 2), rel=1e-4)
        assert info["time_to_collision"] == pytest.approx(seconds, rel=1e-4)
    assert (terminated, truncated) == (wall < 3.65, False)
    assert reward == -1 or not terminated
    _, rewards, ends, _, infos = batch.step(action[None])
    assert (rewards[0], ends[0]) == (reward, terminated)
    assert infos["gap"][0] == info["gap"]


def test_cars_of_a_batch_drive_as_they_would_alone(course: Course) -> None:
    actions = [normalise_action([8.0, 20.0, 12.0], [0.0, 0.2, 0.001])] * 12
    batch = DriveVectorEnv(num_envs=3, scenario="town", course=course, max_episode_steps=9)
    together = [batch.reset(seed=5)[0]]
    seeds = [car.session.seed for car in batch._cars]
    rewards, ends = [], []
    for action in actions:
        seen, reward, terminated, truncated, _ = batch.step(action)
        together.append(seen)
        rewards.append(reward)
        ends.append((terminated.tolist(), truncated.tolist()))
    for n in range(3):
        single = DriveEnv(scenario="town", course=course)
        single.reset()
        single._car.reset("town", seeds[n])
        for step, action in enumerate(actions):
            seen, reward, terminated, _, _ = single.step(action[n])
            assert rewards[step][n] == pytest.approx(reward)
            assert ends[step][0][n] == terminated
            for name, value in seen.items():
                assert np.abs(together[step + 1][name][n].astype(float) - value).mean() < 0.05  # of 255
            if terminated or step == 8:
                break
        if not terminated:
            assert ends[8][1][n]  # truncated after nine steps
        else:
            assert n == 1  # the one that steers hard
            assert not together[step + 2]["front_wide"][n].any()  # and begins anew in the next step


def test_make_vec_gives_the_shared_batch(course: Course) -> None:
    cars = gymnasium.make_vec("holdover/Drive-v1", num_envs=2, course=course)
    assert isinstance(cars.unwrapped, DriveVectorEnv)
    assert cars.unwrapped.max_episode_steps == 60
    seen, _ = cars.reset(seed=0)
    assert seen in cars.observation_space
    cars.step(cars.action_space.sample())
    cars.close()
    assert all(car.session._stream is None for car in cars.unwrapped._cars)


def test_mistakes_are_named(course: Course) -> None:
    with pytest.raises(ValueError, match="'moon' is not one of town, coast"):
        DriveEnv(scenario="moon", course=course)
    with pytest.raises(ValueError, match="'roof' is not one of front_wide"):
        DriveEnv(cameras=["roof"], course=course)
    with pytest.raises(ValueError, match="'turbo' is not one of eager"):
        DriveEnv(policy="turbo", course=course)

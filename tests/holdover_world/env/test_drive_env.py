"""The environment: Gymnasium's own checker, the geometry against closed forms, the batch against single cars."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", reason="no Gymnasium; pip install 'holdover-world[env]'")
from gymnasium.utils.env_checker import check_env  # noqa: E402

from holdover_world.env.drive_env import Course, DriveEnv, DriveVectorEnv, road_of  # noqa: E402
from holdover_world.scene.cameras import Camera  # noqa: E402
from holdover_world.scene.vehicles import EgoState, normalise_action  # noqa: E402
from holdover_world.sessions import session  # noqa: E402
from holdover_world.sessions.world import Start, World  # noqa: E402
from holdover_world.simulator.scenes import SCENARIOS  # noqa: E402
from tests.holdover_world.env.small import small_course, straight  # noqa: E402
from tests.holdover_world.small import latents, small_config, small_model  # noqa: E402


@pytest.fixture
def course() -> Course:
    return small_course()


def test_gymnasium_finds_no_fault(course: Course) -> None:
    env = gymnasium.make("holdover/Drive-v1", course=course, render_mode="rgb_array")
    check_env(env.unwrapped, skip_close_check=True)
    assert env.observation_space["rear"].shape == (16, 16, 3)
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


def level_course() -> Course:
    """A course seen by a wide camera and a narrow one, both level, and one to the rear."""
    ahead = {"group": "front", "width": 128, "height": 64, "yaw": 0, "pitch": 0, "position": (2.0, 0.0, 1.5)}
    rear = Camera(name="rear", group="rear", width=16, height=16, fov=90, yaw=180, pitch=0, position=(-1.0, 0.0, 1.4))
    cameras = Camera(name="narrow", fov=50, **ahead), Camera(name="wide", fov=100, **ahead), rear
    model = small_model(sizes=small_config(cameras=cameras, channels=16, layers=2, heads=1))
    start = Start(latents=latents(model, 4), actions=torch.zeros(1, 4, 2))
    return Course(world=World(model, {"town": start}), roads={"town": straight(EgoState(speed=10.0))})


@pytest.mark.parametrize("wall", [math.inf, 30.0, 10.0, 4.0, 3.0])
def test_an_obstacle_ahead_costs_reward_and_a_collision_ends(wall: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # A wall so many metres before the rear axle in the newest frame of the wide camera, and nearer everywhere else.
    newest = np.full((64, 128), min(wall - 2.0, 600.0), np.float32)
    depth = {"wide": np.stack([newest / 2, newest]), "narrow": newest[None] / 2, "rear": np.ones((1, 16, 16))}
    advance = session.advance

    def to_a_wall(*arguments: Any) -> list[Any]:
        return [replace(made, depth=depth) for made in advance(*arguments)]

    monkeypatch.setattr("holdover_world.sessions.session.advance", to_a_wall)
    monkeypatch.setattr("holdover_world.env.drive_env.advance", to_a_wall)
    course = level_course()
    batch, single = DriveVectorEnv(scenario="town", course=course), DriveEnv(scenario="town", course=course)
    batch.reset(seed=1), single.reset(seed=1)
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
    rewards, ends = [], []
    for action in actions:
        seen, reward, terminated, truncated, _ = batch.step(action)
        together.append(seen)
        rewards.append(reward)
        ends.append((terminated.tolist(), truncated.tolist()))
    for n in range(3):
        single = DriveEnv(scenario="town", course=course)
        single.reset(seed=5)
        for _ in range(n):  # the generator of the batch gives each car the next seed
            single.reset()
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


def told_by(env: Any, action: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """The actions and plans that sessions are told in one step."""
    told: list[Any] = []
    advance = session.advance

    def note(sessions: Any, actions: Any, plans: Any) -> Any:
        told.append((actions, plans))
        return advance(sessions, actions, plans)

    with monkeypatch.context() as patch:
        patch.setattr("holdover_world.sessions.session.advance", note)
        patch.setattr("holdover_world.env.drive_env.advance", note)
        env.step(action)
    return told[0][0], told[0][1]


def test_an_action_may_hold_a_plan(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    env = DriveEnv(scenario="town", planned=1, course=course)
    check_env(env, skip_close_check=True, skip_render_check=True)
    assert env.action_space.shape == (2, 2)
    env.reset(seed=1)
    actions, plans = told_by(env, np.array([[0.25, 0.5], [-0.5, 2.0]], np.float32), monkeypatch)
    assert (actions, plans) == ([[0.25, 0.5]], [[[0.0, 1.0]]])  # within the action space
    ego = env.unwrapped._car.ego
    plain = DriveEnv(scenario="town", course=course)
    assert plain.action_space.shape == (2,)
    plain.reset(seed=1)
    assert told_by(plain, np.array([0.25, 0.5], np.float32), monkeypatch) == ([[0.25, 0.5]], [None])
    assert plain._car.ego == ego  # the car moves by the command, and not by the plan
    batch = DriveVectorEnv(num_envs=2, scenario="town", planned=1, course=course)
    assert batch.action_space.shape == (2, 2, 2)
    batch.reset(seed=1)
    rows = np.array([[[0.25, 0.5], [0.5, 0.75]], [[0.75, 0.0], [1.0, 0.25]]], np.float32)
    assert told_by(batch, rows, monkeypatch) == ([[0.25, 0.5], [0.75, 0.0]], [[[0.5, 0.75]], [[1.0, 0.25]]])
    with pytest.raises(ValueError, match="planned=-1"):
        DriveEnv(planned=-1, course=course)


def test_make_vec_gives_the_shared_batch(course: Course) -> None:
    cars = gymnasium.make_vec("holdover/Drive-v1", num_envs=2, course=course)
    assert isinstance(cars.unwrapped, DriveVectorEnv)
    assert cars.unwrapped.max_episode_steps == 60
    seen, _ = cars.reset(seed=0)
    assert seen in cars.observation_space
    cars.step(cars.action_space.sample())
    cars.close()
    with pytest.raises(ValueError, match="no video"):
        cars.unwrapped.step(cars.action_space.sample())


def test_mistakes_are_named(course: Course) -> None:
    with pytest.raises(ValueError, match="'moon' is not one of town, coast"):
        DriveEnv(scenario="moon", course=course)
    with pytest.raises(ValueError, match="'roof' is not one of front_wide"):
        DriveEnv(cameras=["roof"], course=course)
    with pytest.raises(ValueError, match="'turbo' is not one of eager"):
        DriveEnv(policy="turbo", course=course)

"""Drive in the world model: ``gymnasium.make("holdover/Drive-v1")``. Importing this module registers the environment.

The world model generates the pictures. The pose of the car comes from the commands, by the kinematic bicycle model of
`holdover_world.scene.vehicles`, and is compared with the lanes of the scene in which the clip was recorded. Obstacles
are measured in the generated depth, if the model has depth (`holdover_world.env.ahead`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from holdover.methods.registry import policy as policy_by_name
from holdover_world.env.ahead import gap_ahead, time_to_collision
from holdover_world.loop.scenarios import first_clip, shipped_clips, shipped_model
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import FPS
from holdover_world.scene.clips import read_clip
from holdover_world.scene.vehicles import MAX_CURVATURE, MAX_SPEED, EgoState, denormalise_action, drive
from holdover_world.sessions.session import SessionChunk, WorldSession, advance
from holdover_world.sessions.world import POLICIES, World, load_starts
from holdover_world.simulator.scenes import build_scene

ID = "holdover/Drive-v1"
#: Seconds to an obstacle from which on the reward is not reduced: the two-second rule.
_SAFE = 2.0
#: The least and the greatest action: normalised speed and curvature.
_LEAST, _MOST = np.array([0, -1], np.float32), np.array([1, 1], np.float32)


@dataclass(frozen=True, kw_only=True)
class Road:
    """The lanes of a scene, and the state of the car at the end of a clip's start.

    Attributes:
        points: points on the centre lines of all lanes, ``[M, 2]`` metres, at most a metre apart.
        headings: the direction of the lane at each point, ``[M]`` radians.
        start: the state of the car.
    """

    points: NDArray[np.float64]
    headings: NDArray[np.float64]
    start: EgoState

    def beside(self, ego: EgoState) -> tuple[float, float]:
        """Offset (m) and heading error (rad) from the nearest lane of the car's direction, positive to the left."""
        turned = _wrapped(ego.yaw - self.headings)
        along = np.abs(turned) < np.pi / 2
        if not along.any():
            return float("inf"), float("inf")
        offsets = np.array([ego.x, ego.y]) - self.points[along]
        nearest = int(np.argmin(np.hypot(*offsets.T)))
        heading = self.headings[along][nearest]
        left = offsets[nearest] @ np.array([-np.sin(heading), np.cos(heading)])
        return float(left), float(turned[along][nearest])


def road_of(scenario: str, frames: int) -> Road:
    """The road of a scenario's shipped clip, with the car where it is after ``frames`` video frames."""
    clip = read_clip(first_clip(shipped_clips(), scenario, frames), cameras=[], frames=frames)
    lanes = build_scene(scenario, clip.seed).lanes
    points, headings = [], []
    for lane in lanes:
        steps = np.arange(0.0, lane.arc[-1], 1.0)
        xy = np.stack([np.interp(steps, lane.arc, lane.points[:, k]) for k in (0, 1)], -1)
        ahead = np.stack([np.interp(steps + 0.5, lane.arc, lane.points[:, k]) for k in (0, 1)], -1)
        behind = np.stack([np.interp(steps - 0.5, lane.arc, lane.points[:, k]) for k in (0, 1)], -1)
        points.append(xy)
        headings.append(np.arctan2(*(ahead - behind).T[::-1]))
    (x, y, yaw), (speed, curvature) = clip.poses[-1], clip.motion[-1]
    start = EgoState(x=float(x), y=float(y), yaw=float(yaw), speed=float(speed), curvature=float(curvature))
    return Road(points=np.concatenate(points), headings=np.concatenate(headings), start=start)


@dataclass(frozen=True, kw_only=True)
class Course:
    """What environments share: a world, and the road of each of its scenarios."""

    world: World
    roads: dict[str, Road]


def course_of(model: WorldModel, policies: Sequence[str] = POLICIES) -> Course:
    """A course of a model: the shipped clips' roads, under these policies."""
    starts, sizes = load_starts(model), model.sizes
    offered = {name: policy_by_name(name) for name in policies}
    world = World(model, starts, policies=offered, depth="depth" in sizes.modalities)
    frames = 2 * sizes.window * sizes.frames_per_latent
    return Course(world=world, roads={name: road_of(name, frames) for name in starts})


@cache
def shipped_course(policies: tuple[str, ...] = POLICIES) -> Course:
    """The course of the shipped model. It is loaded once."""
    return course_of(WorldModel.load(shipped_model()), policies)


class _Car:
    """One car on its road: its pose, its reward, and the end of its episode."""

    def __init__(self, course: Course, cameras: Sequence[str], policy: str | None, max_offset: float) -> None:
        self.course, self.max_offset = course, max_offset
        sizes = {c.name: (c.height, c.width, 3) for c in course.world.model.sizes.cameras}
        unknown = [name for name in cameras if name not in sizes]
        if unknown:
            raise ValueError(f"camera {unknown[0]!r} is not one of {', '.join(sizes)}")
        self.pictures = {name: sizes[name] for name in (cameras or sizes)}
        ahead = [camera for camera in course.world.model.sizes.cameras if camera.yaw == 0]
        most = np.array([max_offset, np.pi / 2], np.float32)
        self._lane = -most, most
        self.ahead = max(ahead, key=lambda camera: camera.fov, default=None)
        self.session = WorldSession(course.world, policy=policy)

    def reset(self, scenario: str, seed: int) -> dict[str, Any]:
        self.session.reset(scenario, seed)
        self.road = self.course.roads[scenario]
        self.ego = self.road.start
        return self._info()

    def move(
        self, action: NDArray[np.float32], depth: Mapping[str, NDArray[np.float32]]
    ) -> tuple[float, bool, dict[str, Any]]:
        """Move the car under a normalised action that gave this depth. Returns reward, terminated and info."""
        speed, curvature = denormalise_action(action)
        for _ in range(self.course.world.model.sizes.frames_per_latent):
            self.ego = drive(self.ego, float(speed), float(curvature), dt=1 / FPS)
        info = self._info()
        over, safe = not abs(info["offset"]) <= self.max_offset, 1.0
        if self.ahead is not None and self.ahead.name in depth:
            info["gap"] = gap_ahead(depth[self.ahead.name][-1], self.ahead, curvature=self.ego.curvature)
            info["time_to_collision"] = time_to_collision(info["gap"], self.ego.speed)
            over, safe = over or info["gap"] <= 0, min(1.0, info["time_to_collision"] / _SAFE)
        if over:
            return -1.0, True, info
        progress = self.ego.speed * np.cos(info["heading_error"]) / MAX_SPEED
        return float(progress * (1 - (info["offset"] / self.max_offset) ** 2) * safe), False, info

    def observe(self, frames: Mapping[str, NDArray[np.uint8]] | None) -> dict[str, Any]:
        """The newest frame of each camera (black before the first chunk), the car's motion, its place in the lane."""
        seen: dict[str, Any] = {
            name: np.zeros(shape, np.uint8) if frames is None else frames[name][-1]
            for name, shape in self.pictures.items()
        }
        return {
            **seen,
            "ego": np.array([self.ego.speed, self.ego.curvature], np.float32),
            "lane": np.clip(np.array(self.beside, np.float32), *self._lane),
        }

    def spaces(self, planned: int) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
        """The observation space and the action space."""
        if planned < 0:
            raise ValueError(f"planned={planned}: give the number of frames that a plan covers, 0 for no plan")
        seen: dict[str, gymnasium.Space[Any]] = {
            name: gymnasium.spaces.Box(0, 255, shape, np.uint8) for name, shape in self.pictures.items()
        }
        most = np.array([MAX_SPEED, MAX_CURVATURE], np.float32) * np.float32(1.01)
        seen["ego"] = gymnasium.spaces.Box(np.array([0, -1], np.float32) * most, most, dtype=np.float32)
        seen["lane"] = gymnasium.spaces.Box(*self._lane, dtype=np.float32)
        least, most = (np.tile(each, (1 + planned, 1)) if planned else each for each in (_LEAST, _MOST))
        return gymnasium.spaces.Dict(seen), gymnasium.spaces.Box(least, most, dtype=np.float32)

    def _info(self) -> dict[str, Any]:
        self.beside = offset, heading_error = self.road.beside(self.ego)
        return {"offset": offset, "heading_error": heading_error, "x": self.ego.x, "y": self.ego.y, "yaw": self.ego.yaw}


def _chosen(course: Course, scenario: str | None, rng: np.random.Generator) -> tuple[str, int]:
    if scenario is not None and scenario not in course.roads:
        raise ValueError(f"scenario {scenario!r} is not one of {', '.join(course.roads)}")
    return scenario or str(rng.choice(list(course.roads))), int(rng.integers(2**31))


def _clipped(action: Any) -> tuple[NDArray[np.float32], list[list[float]] | None]:
    """The command within the action space, and the plan, if there is one."""
    bounded = np.clip(np.asarray(action, np.float32), _LEAST, _MOST)
    return (bounded, None) if bounded.ndim == 1 else (bounded[0], bounded[1:].tolist())


class DriveEnv(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """Keep the lane and drive fast. One step is one chunk: a third of a second with the shipped model.

    The action is normalised speed in [0, 1] and curvature in [-1, 1]. With ``planned`` it has more rows, ``[1 +
    planned, 2]``: after the command a plan, what is intended in the next chunks. The observation is the newest frame of
    each camera; ``ego``, speed in m/s and curvature in 1/m; and ``lane``, the reading of a lane sensor: offset from the
    centre line in metres, at most ``max_offset``, and heading error in radians, both positive to the left.

    The reward is ``speed along the lane / greatest speed * (1 - (offset / max_offset)**2)``. If the model has depth, it
    is multiplied by ``time to collision / 2 s`` when that is less than 1. Leaving the lane or a collision ends the
    episode with a reward of -1.

    Args:
        scenario: where episodes start; by default each episode draws one.
        cameras: the cameras to observe; by default all.
        policy: one of the world's policies; by default its first.
        max_offset: the offset in metres at which the car has left the lane.
        planned: for how many chunks ahead the action holds a plan; 0 for none, then frames that are not yet commanded
            hold the newest action. A window of W latent frames has use for W - 1.
        course: by default that of the shipped model.

    Attributes:
        newest: the newest chunk; None at the beginning of an episode.

    Raises:
        ValueError: there is no such scenario, camera or policy, or ``planned`` is negative.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012

    def __init__(
        self,
        scenario: str | None = None,
        cameras: Sequence[str] = (),
        policy: str | None = None,
        max_offset: float = 1.75,
        planned: int = 0,
        course: Course | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.course, self.scenario, self.render_mode = course or shipped_course(), scenario, render_mode
        _chosen(self.course, scenario, np.random.default_rng())
        self._car = _Car(self.course, cameras, policy, max_offset)
        self.observation_space, self.action_space = self._car.spaces(planned)
        self.newest: SessionChunk | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode. Pictures are black until the first step."""
        super().reset(seed=seed)
        info = self._car.reset(*_chosen(self.course, self.scenario, self.np_random))
        self.newest = None
        return self._car.observe(None), info

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Generate one chunk under an action, which is clipped to the action space."""
        bounded, plan = _clipped(action)
        self.newest = self._car.session.step(bounded.tolist(), plan)
        reward, over, info = self._car.move(bounded, self.newest.depth)
        return self._car.observe(self.newest.frames), reward, over, False, info

    def render(self) -> NDArray[np.uint8] | None:
        """The newest frame of the first camera."""
        if self.render_mode is None:
            return None
        observed = self._car.observe(self.newest.frames if self.newest else None)
        first: NDArray[np.uint8] = observed[next(iter(self._car.pictures))]
        return first

    def close(self) -> None:
        self._car.session.close()


class DriveVectorEnv(gymnasium.vector.VectorEnv[dict[str, Any], NDArray[np.float32], NDArray[Any]]):
    """Many cars in one world: a step advances all of them in shared forward passes. Arguments as for `DriveEnv`.

    A car whose episode ended, or that drove ``max_episode_steps``, is reset in the next step and ignores that action.
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        scenario: str | None = None,
        cameras: Sequence[str] = (),
        policy: str | None = None,
        max_offset: float = 1.75,
        planned: int = 0,
        course: Course | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        self.num_envs, self.course, self.scenario = num_envs, course or shipped_course(), scenario
        self.max_episode_steps = max_episode_steps
        _chosen(self.course, scenario, np.random.default_rng())
        self._cars = [_Car(self.course, cameras, policy, max_offset) for _ in range(num_envs)]
        self.single_observation_space, self.single_action_space = self._cars[0].spaces(planned)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._over = np.zeros(num_envs, bool)
        self._steps = np.zeros(num_envs, int)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self._over[:] = False
        infos = [self._begin(n) for n in range(self.num_envs)]
        seen = [car.observe(None) for car in self._cars]
        return self._stacked(seen), self._merged(infos)

    def step(
        self, actions: NDArray[np.float32]
    ) -> tuple[dict[str, Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        bounded, plans = zip(*map(_clipped, actions), strict=True)
        going = [n for n in range(self.num_envs) if not self._over[n]]
        sessions = [self._cars[n].session for n in going]
        made = advance(sessions, [bounded[n].tolist() for n in going], [plans[n] for n in going])
        rewards, over = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        seen: dict[int, dict[str, Any]] = {}
        infos: dict[int, dict[str, Any]] = {}
        for n, chunk in zip(going, made, strict=True):
            if not isinstance(chunk, SessionChunk):
                raise chunk
            rewards[n], over[n], infos[n] = self._cars[n].move(bounded[n], chunk.depth)
            seen[n] = self._cars[n].observe(chunk.frames)
            self._steps[n] += 1
        for n in map(int, np.flatnonzero(self._over)):
            infos[n] = self._begin(n)
            seen[n] = self._cars[n].observe(None)
        limit = self.max_episode_steps
        truncated = np.array([limit is not None and self._steps[n] >= limit for n in range(self.num_envs)]) & ~over
        self._over = over | truncated
        cars = range(self.num_envs)
        return self._stacked([seen[n] for n in cars]), rewards, over, truncated, self._merged([infos[n] for n in cars])

    def close_extras(self, **_: Any) -> None:
        for car in self._cars:
            car.session.close()

    def _begin(self, n: int) -> dict[str, Any]:
        self._steps[n] = 0
        return self._cars[n].reset(*_chosen(self.course, self.scenario, self.np_random))

    def _stacked(self, seen: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: np.stack([each[name] for each in seen]) for name in seen[0]}

    def _merged(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for n, info in enumerate(infos):
            merged = self._add_info(merged, info, n)
        return merged


def _wrapped(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    wrapped: NDArray[np.float64] = (angle + np.pi) % (2 * np.pi) - np.pi
    return wrapped


gymnasium.register(
    ID, entry_point=f"{__name__}:DriveEnv", vector_entry_point=f"{__name__}:DriveVectorEnv", max_episode_steps=60
)

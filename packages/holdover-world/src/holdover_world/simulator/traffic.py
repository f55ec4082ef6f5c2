"""The other cars: they follow lanes, keep their distance to anything in the way, and take turns at junctions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdover_world.scene.vehicles import LENGTH, EgoState, follow
from holdover_world.simulator.meshes import CAR_COLOURS
from holdover_world.simulator.roads import Lane, Points, Route
from holdover_world.simulator.scenery import Scene

EGO = -1  # the ego's number where cars are numbered
_STEP = 1.5  # metres between the points a driver looks at
_CORRIDOR = 1.8  # metres from the path to the middle of a disc; three discs cover a car
_DISCS = np.array([-1.5, 0.0, 1.5])
_ASK = 22.0  # metres before a junction at which a car asks to cross


@dataclass
class Car:
    """A car on its route: metres along it, speed in m/s, and its looks."""

    route: Route
    s: float
    speed: float
    eagerness: float
    colour: int
    van: bool
    x: float = 0.0
    y: float = 0.0
    yaw: float = 0.0


class Junctions:
    """Who may cross a junction: only cars from one lane at a time, first come, first served."""

    def __init__(self) -> None:
        self._holders: dict[int, dict[int, int]] = {}  # junction -> car -> lane it comes from

    def request(self, junction: int, car: int, lane: int) -> bool:
        """Whether ``car``, coming from ``lane``, may cross now."""
        holders = self._holders.setdefault(junction, {})
        if any(other != lane for holder, other in holders.items() if holder != car):
            return False
        holders[car] = lane
        return True

    def release(self, car: int, keep: int | None = None) -> None:
        """Give back the junctions that ``car`` holds, except ``keep``."""
        for junction, holders in self._holders.items():
            if junction != keep:
                holders.pop(car, None)


class Traffic:
    """All cars of a scene except the ego and the parked ones."""

    def __init__(self, scene: Scene, ego: EgoState, rng: np.random.Generator) -> None:
        self._scene, self._rng = scene, rng
        self.junctions = Junctions()
        self.cars: list[Car] = []
        self._place(ego)

    def step(self, ego: EgoState, dt: float) -> None:
        """Let ``dt`` seconds pass, while the ego stays where it is."""
        if not self.cars:
            return
        gaps, leaders = self._gaps(ego)
        for k, car in enumerate(self.cars):
            gap, leader = float(gaps[k]), float(leaders[k])
            stop = self._stop_line(k, car)
            if stop < gap:
                gap, leader = stop, 0.0
            desired = self._desired(car)
            acceleration = float(follow(car.speed, desired, gap, leader))
            before = car.speed
            car.speed = max(0.0, car.speed + acceleration * dt)
            car.s += (before + car.speed) / 2 * dt
        for car in self.cars:
            self._recycle(car, ego)
            _settle(car)

    def discs(self, ego: EgoState | None) -> tuple[Points, NDArray[np.float64], NDArray[np.int64]]:
        """Obstacles: discs ``[N, 2]``, their velocities ``[N, 2]`` and the numbers of their cars ``[N]``."""
        rows = [(car.x, car.y, car.yaw, car.speed, k) for k, car in enumerate(self.cars)]
        if ego is not None:
            rows.append((*ego.centre, ego.yaw, ego.speed, EGO))
        if not rows:
            return np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, dtype=np.int64)
        x, y, yaw, speed, owner = np.array(rows).T
        direction = np.stack([np.cos(yaw), np.sin(yaw)], axis=1)
        centres = np.stack([x, y], axis=1)[:, None] + _DISCS[:, None] * direction[:, None]
        velocity = np.repeat(direction * speed[:, None], 3, axis=0)
        return centres.reshape(-1, 2), velocity, np.repeat(owner.astype(np.int64), 3)

    def _gaps(self, ego: EgoState) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        discs, velocities, owners = self.discs(ego)
        gaps, speeds = np.full(len(self.cars), np.inf), np.zeros(len(self.cars))
        for k, car in enumerate(self.cars):
            near = (np.abs(discs - (car.x, car.y)).max(axis=1) < reach(car.speed) + 3.0) & (owners != k)
            if near.any():
                path = car.route.at(car.s + np.arange(0.0, reach(car.speed), _STEP))
                gaps[k], speeds[k] = gap_ahead(path, discs[near], velocities[near])
        return gaps, speeds

    def _desired(self, car: Car) -> float:
        lane, _ = car.route.lane_at(car.s)
        limit = self._scene.lanes[lane].limit
        ahead, _ = car.route.lane_at(car.s + 1.2 * car.speed + 3.0)
        return min(limit, self._scene.lanes[ahead].limit) * car.eagerness

    def _stop_line(self, k: int, car: Car) -> float:
        """Metres to the stop line at which ``car`` has to wait, or infinity."""
        lane, _ = car.route.lane_at(car.s - LENGTH)
        if (inside := self._scene.lanes[lane].junction) is None:
            lane, _ = car.route.lane_at(car.s)
            inside = self._scene.lanes[lane].junction
        entry = car.route.next_junction(car.s)
        ahead = entry is not None and entry[0] - car.s < _ASK
        if inside is None and not ahead:
            self.junctions.release(k)
        if inside is not None or not ahead or entry is None:
            return math.inf
        self.junctions.release(k, keep=entry[2])
        if self.junctions.request(entry[2], k, lane):
            return math.inf
        return max(entry[0] - car.s - LENGTH / 2, 0.1)

    def _place(self, ego: EgoState) -> None:
        """Spread cars over the lanes, with room between them and around the ego."""
        lanes, span = self._scene.lanes, self._scene.span
        for _ in range(self._scene.cars * 3):
            if len(self.cars) == self._scene.cars:
                break
            number = int(self._rng.integers(len(lanes)))
            lane = lanes[number]
            if lane.junction is not None:
                continue
            low, high = 6.0, lane.length - 6.0
            if span is not None:
                here = _nearest(lane, *ego.centre)
                low, high = here - span * 0.4, here + span * 0.6
            s = float(self._rng.uniform(low, high))
            position = _point(lane, s)
            taken = [(car.x, car.y) for car in self.cars] + [ego.centre]
            room = 14.0 if span is not None else 11.0
            eagerness, colour, van = (
                self._rng.uniform(0.82, 1.1),
                int(self._rng.integers(len(CAR_COLOURS))),
                self._rng.random() < 0.2,
            )
            if min(math.hypot(position[0] - x, position[1] - y) for x, y in taken) > room:
                route = Route(lanes, number, self._rng)
                speed = lane.limit * eagerness * (0.9 if span is not None else 0.5)
                car = Car(route, s, float(speed), float(eagerness), colour, bool(van))
                _settle(car)
                self.cars.append(car)

    def _recycle(self, car: Car, ego: EgoState) -> None:
        """On a long road, move cars that are far behind to far ahead and back, so that the road stays busy."""
        span = self._scene.span
        if span is None:
            return
        ahead = car.s - _nearest(self._scene.lanes[car.route.stretches[0][2]], *ego.centre)
        if ahead > 0.6 * span:
            car.s -= span
        elif ahead < -0.4 * span:
            car.s += span


def reach(speed: float) -> float:
    """The metres to look ahead at a speed in m/s."""
    return 14.0 + 1.5 * speed + speed**2 / 8.0


def gap_ahead(path: Points, discs: Points, velocities: Points) -> tuple[float, float]:
    """The free way along a path.

    Args:
        path: points ``[S, 2]`` from the middle of the car on, evenly spaced.
        discs, velocities: the obstacles, ``[N, 2]`` each.

    Returns:
        Metres from the car's bumper to the first obstacle, and the obstacle's speed along the path in m/s; (inf, 0) if
        the way is free.
    """
    if not len(discs):
        return math.inf, 0.0
    distance = np.hypot(path[:, None, 0] - discs[None, :, 0], path[:, None, 1] - discs[None, :, 1])
    hits: NDArray[np.bool_] = np.any(distance < _CORRIDOR, axis=1)
    # An obstacle that already overlaps the car's middle must not stop it for ever.
    hits[:2] = False
    if not hits.any():
        return math.inf, 0.0
    first = int(np.argmax(hits))
    disc = int(np.argmin(distance[first]))
    direction = path[first] - path[first - 1]
    spacing = float(np.hypot(*direction))
    speed = float(velocities[disc] @ direction) / max(spacing, 1e-6)
    return max(first * spacing - LENGTH / 2, 0.1), speed


def _settle(car: Car) -> None:
    s = np.array([car.s - 1.3, car.s, car.s + 1.3])
    back, middle, front = car.route.at(np.maximum(s, 0.0))
    car.x, car.y = float(middle[0]), float(middle[1])
    car.yaw = math.atan2(front[1] - back[1], front[0] - back[0])


def _nearest(lane: Lane, x: float, y: float) -> float:
    return float(lane.arc[int(np.argmin(np.hypot(lane.points[:, 0] - x, lane.points[:, 1] - y)))])


def _point(lane: Lane, s: float) -> Points:
    return np.array([np.interp(s, lane.arc, lane.points[:, 0]), np.interp(s, lane.arc, lane.points[:, 1])])

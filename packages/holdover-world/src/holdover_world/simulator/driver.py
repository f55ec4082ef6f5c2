"""The scripted driver that makes the data: it keeps its lane, changes it, turns, brakes, stops, and drives badly.

It decides once per four frames (3 Hz), from the present alone: its place, the other cars and its own route.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from holdover_world.scene.cameras import FPS
from holdover_world.scene.vehicles import LENGTH, MAX_CURVATURE, MAX_SPEED, REAR_TO_CENTRE, WIDTH, EgoState, follow
from holdover_world.simulator.roads import Points, Route, arc
from holdover_world.simulator.scenery import Scene
from holdover_world.simulator.traffic import EGO, Traffic, gap_ahead, reach

#: Frames for which one command holds.
HOLD = 4
_DT = HOLD / FPS
_COMFORT = 2.4  # m/s^2, sideways: sets the speed in bends


@dataclass
class _Whim:
    """A deviation from good driving that lasts for a while."""

    kind: str
    until: float
    value: float = 0.0


class Driver:
    """Drives the ego through a scene. ``start`` is the lane where it begins, and the metres along it."""

    def __init__(self, scene: Scene, start: tuple[int, float], rng: np.random.Generator) -> None:
        self._scene, self._rng = scene, rng
        self._lane, self._s = start
        self._route = Route(scene.lanes, self._lane, rng)
        self._time = 0.0
        self._cruise = float(rng.uniform(*scene.cruise))
        self._whim = _Whim("calm", float(rng.uniform(0.5, 3.0)))
        self._abrupt = bool(rng.random() < 0.4)  # commands the target at once instead of easing towards it
        self._shift = self._shift_speed = 0.0  # metres to the left that a lane change has still to cover
        self._turn_until = -1.0  # metres along the route to the end of a U-turn
        self._turn_due = float(rng.uniform(1.0, 4.0))

    def command(self, ego: EgoState, traffic: Traffic) -> tuple[float, float]:
        """Commanded speed (m/s) and curvature (1/m) for the next four frames."""
        self._s = self._route.project(ego.x, ego.y, self._s)
        self._choose(ego, traffic)
        curvature = self._steer(ego)
        speed = self._speed(ego, traffic)
        self._time += _DT
        return speed, curvature

    # Decisions.

    def _choose(self, ego: EgoState, traffic: Traffic) -> None:
        if self._time >= self._whim.until:
            self._whim = self._next_whim(ego)
        if self._whim.kind == "change" and self._change_lane(traffic):
            self._whim.kind = "calm"
        turning = self._s < self._turn_until
        if self._scene.opposite and not turning and self._time > self._turn_due:
            self._begin_u_turn(ego, traffic)

    def _next_whim(self, ego: EgoState) -> _Whim:
        kinds = {"calm": 0.3, "cruise": 0.2, "brake": 0.1, "stop": 0.05, "pulse": 0.17, "drift": 0.08, "change": 0.1}
        if ego.speed < 3.0:
            kinds = {"calm": 0.5, "cruise": 0.5}
        kind = str(self._rng.choice(list(kinds), p=list(kinds.values())))
        self._abrupt = bool(self._rng.random() < 0.4)
        length, value = float(self._rng.uniform(1.0, 3.5)), 0.0
        if kind == "cruise":
            self._cruise = float(self._rng.uniform(0.7 * self._scene.cruise[0], self._scene.cruise[1]))
        elif kind == "brake":
            length, value = float(self._rng.uniform(0.3, 1.6)), float(self._rng.uniform(0.0, 0.5))
        elif kind == "stop":
            length = float(self._rng.uniform(1.0, 3.0)) + ego.speed / 6.0
        elif kind == "pulse":
            length = _DT * int(self._rng.integers(1, 3))
            value = float(self._rng.choice([-1, 1]) * self._rng.uniform(1.0, 4.0))
        elif kind == "drift":
            value = float(self._rng.uniform(-0.7, 0.7))
        elif kind == "change":
            length = 4.0
        return _Whim(kind, self._time + length, value)

    def _change_lane(self, traffic: Traffic) -> bool:
        """Change to a neighbouring lane if there is room. The path approaches it smoothly."""
        lane, s = self._route.lane_at(self._s)
        here = self._scene.lanes[lane]
        choices = [n for n in (here.left, here.right) if n is not None]
        if not choices or abs(self._shift) > 0.5 or self._s < self._turn_until:
            return False
        target = int(self._rng.choice(choices))
        route = Route(self._scene.lanes, target, self._rng)
        x, y = self._route.at(self._s)
        there = route.project(x, y, s)
        discs, _, _ = traffic.discs(None)
        beside = route.at(there + np.arange(-14.0, 22.0, 2.0))
        if len(discs) and np.hypot(*(beside[:, None] - discs[None]).transpose(2, 0, 1)).min() < 2.2:
            return False
        aside = float(np.hypot(*(route.at(there) - (x, y))))
        self._shift += aside if target == here.right else -aside
        self._shift_speed = abs(self._shift) / float(self._rng.uniform(1.6, 3.6))
        self._route, self._s, self._turn_until = route, there, -1.0
        return True

    def _begin_u_turn(self, ego: EgoState, traffic: Traffic) -> None:
        lane, _ = self._route.lane_at(self._s)
        if lane not in self._scene.opposite:
            self._change_lane(traffic)
            return
        if abs(self._shift) > 0.3:
            return
        route, end = self._u_turn(lane)
        ahead = route.at(np.arange(0.0, end, 1.5))
        discs, velocities, _ = traffic.discs(None)
        soon = np.concatenate([discs + t * velocities for t in (0.0, 1.2, 2.4)])
        if len(discs) and np.hypot(*(ahead[:, None] - soon[None]).transpose(2, 0, 1)).min() < 2.8:
            return
        self._route, self._s, self._turn_until = route, 0.0, end
        self._turn_due = self._time + float(self._rng.uniform(9.0, 14.0))

    def _u_turn(self, lane: int) -> tuple[Route, float]:
        """A route that soon turns round and goes on in the opposite lane, and the metres to the turn's end."""
        lead = float(self._rng.uniform(6.0, 12.0))
        begin, heading = self._route.at(self._s + lead), self._route.heading(self._s + lead)
        opposite = self._scene.lanes[self._scene.opposite[lane]]
        radius = float(np.hypot(*(opposite.points - begin).T).min()) / 2
        centre = begin + radius * np.array([-math.sin(heading), math.cos(heading)])
        half_circle = arc((centre[0], centre[1]), radius, heading - math.pi / 2, heading + math.pi / 2, spacing=0.5)
        approach = self._route.at(self._s + np.arange(0.0, lead, 1.0))
        exit_point = half_circle[-1]
        direction = -np.array([math.cos(heading), math.sin(heading)])
        onward = opposite.points[(opposite.points - exit_point) @ direction > 0.5]
        points = np.concatenate([approach, half_circle, onward[:1]])
        # The rest of the opposite lane, from the end of the half circle on.
        number, lanes = self._scene.opposite[lane], [*self._scene.lanes]
        lanes[number] = replace(opposite, points=onward)
        route = Route(lanes, number, self._rng, lead_in=points)
        return route, lead + math.pi * radius + 2.0

    # Their execution.

    def _steer(self, ego: EgoState) -> float:
        """The curvature: pure pursuit of the path, plus that of the whim."""
        self._shift = math.copysign(max(abs(self._shift) - self._shift_speed * _DT, 0.0), self._shift)
        turning = self._s < self._turn_until
        ahead = 3.5 if turning else min(max(3.5 + 0.75 * ego.speed, 5.0), 24.0)
        aside = self._shift + (self._whim.value if self._whim.kind == "drift" else 0.0)
        target = self._beside(self._s + ahead, aside)
        dx, dy = target[0] - ego.x, target[1] - ego.y
        left = -math.sin(ego.yaw) * dx + math.cos(ego.yaw) * dy
        curvature = 2.0 * left / max(dx * dx + dy * dy, 1.0)
        if self._whim.kind == "pulse":
            curvature += self._whim.value / max(ego.speed, 7.0) ** 2
        return float(np.clip(curvature, -MAX_CURVATURE, MAX_CURVATURE))

    def _speed(self, ego: EgoState, traffic: Traffic) -> float:
        wish = min(self._cruise, self._bend_speed(ego.speed))
        lane, _ = self._route.lane_at(self._s)
        if not self._scene.span:
            wish = min(wish, self._scene.lanes[lane].limit)
        if self._whim.kind == "brake":
            wish *= self._whim.value
        elif self._whim.kind == "stop":
            wish = 0.0
        gap, leader = self._gap(ego, traffic)
        stop = self._stop_line(traffic)
        if stop < gap:
            gap, leader = stop, 0.0
        acceleration = float(follow(ego.speed, max(wish, 0.1), gap, leader))
        eased = ego.speed + acceleration * _DT
        safe = ego.speed + float(follow(ego.speed, MAX_SPEED, gap, leader)) * _DT
        abrupt = self._abrupt or self._whim.kind == "brake"
        speed = min(wish, safe) if abrupt and wish < ego.speed else min(wish, eased)
        if abrupt and wish > ego.speed and gap > 2.0 * reach(ego.speed):
            speed = wish
        return float(np.clip(speed if speed > 0.3 else 0.0, 0.0, MAX_SPEED))

    def _bend_speed(self, speed: float) -> float:
        """The speed that the bends ahead allow."""
        s = self._s + np.arange(0.0, 6.0 + 1.6 * speed, 2.0)
        points = self._route.at(np.concatenate([s - 1.5, s, s + 1.5])).reshape(3, -1, 2)
        first, second = points[1] - points[0], points[2] - points[1]
        turn = np.abs(first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]) / 1.5**3
        allowed = np.sqrt(_COMFORT / np.maximum(turn, 1e-4))
        # Braking at 2 m/s^2 until there.
        return float(np.sqrt(allowed**2 + 4.0 * (s - self._s)).min())

    def _gap(self, ego: EgoState, traffic: Traffic) -> tuple[float, float]:
        discs, velocities, _ = traffic.discs(None)
        s = self._s + REAR_TO_CENTRE + np.arange(0.0, reach(ego.speed), 1.5)
        path = self._route.at(s)
        if self._shift:
            fade = np.maximum(abs(self._shift) - self._shift_speed * (s - self._s) / max(ego.speed, 1.0), 0.0)
            across = np.gradient(path, axis=0)
            across /= np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-6)
            left = np.stack([-across[:, 1], across[:, 0]], axis=1)
            path = path + (np.copysign(fade, self._shift))[:, None] * left
        return gap_ahead(path, discs, velocities)

    def _stop_line(self, traffic: Traffic) -> float:
        """Metres to the stop line at which the driver has to wait, or infinity."""
        front = self._s + REAR_TO_CENTRE + LENGTH / 2
        lane, _ = self._route.lane_at(self._s - WIDTH)
        inside = self._scene.lanes[lane].junction
        entry = self._route.next_junction(self._s)
        if inside is not None:
            return math.inf
        if entry is None or entry[0] - front > 22.0:
            traffic.junctions.release(EGO)
            return math.inf
        traffic.junctions.release(EGO, keep=entry[2])
        if traffic.junctions.request(entry[2], EGO, lane):
            return math.inf
        return max(entry[0] - front, 0.1)

    def _beside(self, s: float, left: float) -> Points:
        heading = self._route.heading(s)
        beside: Points = self._route.at(s) + left * np.array([-math.sin(heading), math.cos(heading)])
        return beside

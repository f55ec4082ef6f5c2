"""Lanes, the network they form, and routes along them. Metres, x and y in world coordinates."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]


@dataclass(kw_only=True)
class Lane:
    """The centre line of one lane, driven from its first point to its last.

    ``left`` and ``right`` are the neighbours in the same direction, ``junction`` is the crossing that the lane leads
    through.
    """

    points: Points
    limit: float
    successors: list[int] = field(default_factory=list)
    left: int | None = None
    right: int | None = None
    junction: int | None = None

    def __post_init__(self) -> None:
        self.arc = arc_lengths(self.points)

    @property
    def length(self) -> float:
        """Metres from start to end."""
        return float(self.arc[-1])


class Route:
    """A path along lanes, measured in metres from its start and extended as far as it is looked at.

    Where a lane forks, ``rng`` chooses. A lane without a successor is extended straight on.
    """

    def __init__(
        self, lanes: list[Lane], lane: int, rng: np.random.Generator, *, lead_in: Points | None = None
    ) -> None:
        self._lanes, self._rng = lanes, rng
        self._points = np.zeros((0, 2)) if lead_in is None else lead_in
        self.stretches: list[tuple[float, float, int]] = []  # (start, end, lane)
        self._append(lane)

    @property
    def length(self) -> float:
        """Metres known so far."""
        return float(self._arc[-1])

    def at(self, s: ArrayLike) -> Points:
        """Positions ``[..., 2]`` at ``s`` metres."""
        s = np.asarray(s, dtype=np.float64)
        self._reach(float(s.max()))
        beyond = np.maximum(s - self.length, 0.0)[..., None] * self._end_direction()
        x, y = self._points.T
        points: Points = np.stack([np.interp(s, self._arc, x), np.interp(s, self._arc, y)], axis=-1) + beyond
        return points

    def heading(self, s: float) -> float:
        """Direction in radians at ``s`` metres."""
        (x0, y0), (x1, y1) = self.at(np.array([s - 0.75, s + 0.75]))
        return float(np.arctan2(y1 - y0, x1 - x0))

    def project(self, x: float, y: float, near: float) -> float:
        """Metres along the route of the point nearest to (x, y), searched around ``near``."""
        candidates = np.arange(max(near - 6.0, 0.0), near + 14.0, 0.25)
        distances = np.hypot(*(self.at(candidates) - (x, y)).T)
        return float(candidates[np.argmin(distances)])

    def lane_at(self, s: float) -> tuple[int, float]:
        """The lane at ``s`` metres, and the metres driven on it (negative on the way to the first lane)."""
        self._reach(s)
        for start, end, lane in self.stretches:
            if s < end:
                return lane, s - start
        start, _, lane = self.stretches[-1]
        return lane, s - start

    def next_junction(self, s: float) -> tuple[float, float, int] | None:
        """Entry and exit (metres along the route) and number of the next junction, if it begins within 40 m."""
        self._reach(s + 40.0)
        for start, end, lane in self.stretches:
            junction = self._lanes[lane].junction
            if junction is not None and s < start <= s + 40.0:
                return start, end, junction
        return None

    def _reach(self, s: float) -> None:
        while s > self.length and (successors := self._lanes[self.stretches[-1][2]].successors):
            self._append(successors[int(self._rng.integers(len(successors)))])

    def _append(self, lane: int) -> None:
        start = arc_lengths(self._points)[-1] if len(self._points) else 0.0
        points = self._lanes[lane].points
        if len(self._points):
            start += float(np.hypot(*(points[0] - self._points[-1])))
            points = points[int(np.allclose(points[0], self._points[-1])) :]
        self._points = np.concatenate([self._points, points])
        self._arc = arc_lengths(self._points)
        self.stretches.append((float(start), self.length, lane))

    def _end_direction(self) -> Points:
        step: Points = self._points[-1] - self._points[-2]
        return step / float(np.hypot(*step))


def arc_lengths(points: Points) -> NDArray[np.float64]:
    """Metres along a line ``[N, 2]`` at each of its points, ``[N]``."""
    return np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])


def normals(points: Points) -> Points:
    """Unit vectors ``[N, 2]`` to the left of a line ``[N, 2]``."""
    direction = np.gradient(points, axis=0)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return np.stack([-direction[:, 1], direction[:, 0]], axis=1)


def offset(points: Points, left: float) -> Points:
    """The line ``[N, 2]`` moved ``left`` metres to its left."""
    return points + left * normals(points)


def arc(centre: tuple[float, float], radius: float, start: float, end: float, *, spacing: float = 1.0) -> Points:
    """Points ``[N, 2]`` on a circle from angle ``start`` to ``end``, in radians."""
    angles = np.linspace(start, end, max(3, round(abs(end - start) * radius / spacing) + 1))
    return np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)], axis=1)

"""A course small enough for tests."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np

from holdover_world.env.drive_env import Course, Road
from holdover_world.scene.vehicles import EgoState
from tests.holdover_world.sessions.small import small_world


def straight(start: EgoState) -> Road:
    """One lane along x, and one back beside it."""
    x = np.arange(-10.0, 200.0)
    there, back = np.stack([x, 0 * x], -1), np.stack([x, 0 * x + 3.5], -1)
    headings = np.concatenate([0 * x, 0 * x + np.pi])
    return Road(points=np.concatenate([there, back]), headings=headings, start=start)


@cache
def small_course() -> Course:
    roads = {"town": straight(EgoState(speed=10.0)), "coast": straight(EgoState(y=0.5, speed=5.0))}
    return Course(world=small_world(), roads=roads)


def fatal_course() -> Course:
    """Kills the first process that asks for it."""
    marker = Path(os.environ["HOLDOVER_TEST_MARKER"])
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return small_course()

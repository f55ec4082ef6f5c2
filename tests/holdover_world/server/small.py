"""A world and its starts, small enough for tests."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch

import holdover
from holdover_world.env.drive_env import Course, Road
from holdover_world.scene.vehicles import EgoState
from holdover_world.sessions.world import Start, World
from tests.holdover_world.small import latents, small_model

POLICIES = {
    "eager": holdover.xcache_reactive(tau_floor=0.5, tau_dev=1e9, scale=0.5),
    "never": holdover.never(),
}


def small_world() -> World:
    """The same in every process."""
    model = small_model()
    for parameter in model.parameters():
        parameter.mul_(0.4)  # calm: a random model lets rounding grow from chunk to chunk, tenfold in six
    starts = {
        name: Start(latents=latents(model, 4, seed=n), actions=torch.zeros(1, 4, 2))
        for n, name in enumerate(("town", "coast"))
    }
    return World(model, starts, policies=POLICIES)


def action(n: int, seed: int = 0) -> list[float]:
    """The n-th action of a driver who holds each for a few chunks."""
    drawn = torch.rand(2, generator=torch.Generator().manual_seed(1000 * seed + n // 3))
    return [float(value) for value in drawn]


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

"""A world and its starts, small enough for tests."""

from __future__ import annotations

import torch

import holdover
from holdover_world.loop.config import LoopConfig
from holdover_world.sessions.world import Start, World
from tests.holdover_world.small import latents, small_model

POLICIES = {
    "eager": holdover.xcache_reactive(tau_floor=0.5, tau_dev=1e9, scale=0.5),
    "never": holdover.never(),
}


def small_world(loop: LoopConfig | None = None) -> World:
    """The same in every process."""
    model = small_model()
    for parameter in model.parameters():
        parameter.mul_(0.4)  # with larger weights a random model grows rounding errors tenfold in six chunks
    starts = {
        name: Start(latents=latents(model, 4, seed=n), actions=torch.zeros(1, 4, 2))
        for n, name in enumerate(("town", "coast"))
    }
    return World(model, starts, policies=POLICIES, loop=loop)


def action(n: int, seed: int = 0) -> list[float]:
    """The n-th action of a driver who holds each action for three chunks."""
    drawn = torch.rand(2, generator=torch.Generator().manual_seed(1000 * seed + n // 3))
    return [float(value) for value in drawn]

"""The installed world models and their loops, for `holdover calibrate`, `holdover overhead` and `holdover compare`.

holdover calibrate holdover_world.loop.factories:teacher
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from holdover.engine.cache import Cache
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.scenarios import load_scenario, shipped_model
from holdover_world.model.transformer import WorldModel
from holdover_world.runtime import keep_memory

#: Denoising steps of a chunk.
TEACHER, STUDENT = 35, 4


def teacher() -> tuple[WorldModel, Callable[[Cache], Tensor]]:
    """The model of many steps, and four chunks of urban driving."""
    return _installed(TEACHER, chunks=4)


def student() -> tuple[WorldModel, Callable[[Cache], Tensor]]:
    """The model of few steps, and eight chunks of urban driving."""
    return _installed(STUDENT, chunks=8)


def driving(model: WorldModel, *, steps: int, chunks: int) -> Callable[[Cache], Tensor]:
    """A loop that drives a model through the start of the urban scenario; it returns latents ``[1, chunks, N, P]``."""
    scenario = load_scenario("urban", model, chunks=chunks)

    def loop(cache: Cache) -> Tensor:
        start = scenario.start, scenario.start_actions
        config = LoopConfig.of_steps(steps)
        closed = ClosedLoop(model, *start, config=config, cache=cache, track=scenario.track)
        return torch.cat([piece.latents for piece in closed.run(scenario.actions)], 1)

    return loop


def _installed(steps: int, *, chunks: int) -> tuple[WorldModel, Callable[[Cache], Tensor]]:
    keep_memory()
    model = WorldModel.load(shipped_model(steps))
    return model, driving(model, steps=steps, chunks=chunks)

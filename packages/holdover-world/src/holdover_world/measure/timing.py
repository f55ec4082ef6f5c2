"""Speed, measured so that it can be believed: whole cycles of interleaved runs, and the bound beside the ratio."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdover_world.loop.closed_loop import ClosedLoop, LoopConfig
from holdover_world.loop.scenarios import Scenario
from holdover_world.model.transformer import WorldModel


def cycles(seconds: NDArray[np.float64], chunks: int, *, warm_up: int = 1) -> NDArray[np.float64]:
    """Mean seconds of a chunk in each whole cycle ``[cycles]``.

    KV updates fall on every last chunk of a cycle, so single chunks do not compare; cycles do.

    Args:
        seconds: per chunk ``[G]``.
        chunks: of one cycle.
        warm_up: cycles left out at the start.

    Raises:
        ValueError: no whole cycle remains.
    """
    count = len(seconds) // chunks
    if count <= warm_up:
        raise ValueError(
            f"{len(seconds)} chunks hold no cycle of {chunks} after {warm_up} of warm-up; "
            f"run at least {(warm_up + 1) * chunks}"
        )
    whole: NDArray[np.float64] = seconds[: count * chunks].reshape(count, chunks).mean(1)[warm_up:]
    return whole


def speedup(full: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """How many times faster: the ratio of the medians of two interleaved runs."""
    return float(np.median(full) / np.median(other))


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


class BlockClock:
    """Seconds spent in the blocks of denoising passes, or in whole ones."""

    def __init__(self) -> None:
        self.seconds = 0.0


@contextmanager
def clock_blocks(model: WorldModel, *, whole: bool = False) -> Iterator[BlockClock]:
    """Time the blocks of a model's denoising passes, or the ``whole`` passes, while the context is open.

    KV updates are left out.
    """
    clock, entered, denoising = BlockClock(), 0.0, True
    device = next(model.parameters()).device

    def enter_pass(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal denoising
        denoising = not kwargs.get("write", False)

    def enter(_module: Any, _args: Any) -> None:
        nonlocal entered
        entered = now(device)

    def leave(_module: Any, _args: Any, _output: Any) -> None:
        if denoising:
            clock.seconds += now(device) - entered

    hooks = [model.register_forward_pre_hook(enter_pass, with_kwargs=True)]
    for block in [model] if whole else model.blocks:
        hooks += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()


def block_share(loop: ClosedLoop[WorldModel], action: Tensor, *, cycles: int = 2) -> tuple[float, float]:
    """The share of the DiT time, KV updates included, that the blocks of denoising passes take without a cache, and the
    seconds of a chunk.

    Args:
        loop: a loop without a cache, at the start of a cycle; it is run on.
        action: the action ``[A]`` to run it with.
        cycles: how many to run; one more is run first to warm up.

    Raises:
        ValueError: the loop has a cache.
    """
    if loop.cache is not None:
        raise ValueError("the share of block time is that of the model alone; give a loop without a cache")
    for _ in range(loop.window_frames):
        loop.step(action)
    total, chunks = 0.0, cycles * loop.window_frames
    with clock_blocks(loop.model) as clock:
        for _ in range(chunks):
            total += loop.step(action).dit_seconds
    return clock.seconds / total, total / chunks


def cadence_block_share(model: WorldModel, scenario: Scenario, config: LoopConfig) -> tuple[float, float]:
    """`block_share` of a model under a cadence, from a scenario's start."""
    start = scenario.start, scenario.start_actions
    return block_share(ClosedLoop(model, *start, config=config, track=scenario.track), scenario.actions[0])

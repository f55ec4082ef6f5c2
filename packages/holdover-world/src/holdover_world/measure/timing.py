"""Speed: whole cycles of interleaved runs, and the share of time that the blocks take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.scenarios import Scenario
from holdover_world.model.transformer import WorldModel


def cycles(seconds: NDArray[np.float64], chunks: int, *, warm_up: int = 1) -> NDArray[np.float64]:
    """Mean seconds of a chunk in each whole cycle ``[cycles]``.

    The last chunk of a cycle includes the KV update, so single chunks are not comparable, but whole cycles are.

    Args:
        seconds: seconds of each chunk, ``[G]``.
        chunks: the number of chunks in a cycle.
        warm_up: the number of cycles to leave out at the start.

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
    """The speed-up: the ratio of the medians of two interleaved runs."""
    return float(np.median(full) / np.median(other))


def now(device: torch.device) -> float:
    """Seconds on a clock, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


class BlockClock:
    """Seconds spent in the blocks of denoising passes, or in the whole passes."""

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
    """The share of the DiT time that the blocks of denoising passes take without a cache, and the seconds of a chunk.

    KV updates count as DiT time.

    Args:
        loop: a loop without a cache, at the start of a cycle. It is advanced.
        action: the action ``[A]`` of all chunks.
        cycles: the number of cycles to time, after one of warm-up.

    Raises:
        ValueError: the loop has a cache.
    """
    if loop.cache is not None:
        raise ValueError("the share of block time is measured on the model alone; give a loop without a cache")
    for _ in range(loop.window_frames):
        loop.step(action)
    total, chunks = 0.0, cycles * loop.window_frames
    with clock_blocks(loop.model) as clock:
        for _ in range(chunks):
            total += loop.step(action).dit_seconds
    return clock.seconds / total, total / chunks


def cadence_block_share(model: WorldModel, scenario: Scenario, config: LoopConfig) -> tuple[float, float]:
    """`block_share` of a model with this cadence, from the start of a scenario."""
    start = scenario.start, scenario.start_actions
    return block_share(ClosedLoop(model, *start, config=config, track=scenario.track), scenario.actions[0])

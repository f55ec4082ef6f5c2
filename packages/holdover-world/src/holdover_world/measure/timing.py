"""Speed: whole cycles of interleaved runs, and the share of time that blocks and passes take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


def timed(total: int, chunks: int, *, warm_up: int = 1) -> range:
    """The chunks that `cycles` averages: those of whole cycles after the warm-up."""
    return range(warm_up * chunks, total // chunks * chunks)


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
    counted = timed(len(seconds), chunks, warm_up=warm_up)
    if not counted:
        raise ValueError(
            f"{len(seconds)} chunks hold no cycle of {chunks} after {warm_up} of warm-up; "
            f"run at least {(warm_up + 1) * chunks}"
        )
    whole: NDArray[np.float64] = seconds[counted.start : counted.stop].reshape(-1, chunks).mean(1)
    return whole


def speedup(full: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The speed-up: the median ratio of the cycles of two interleaved runs, which were driven side by side."""
    return float(np.median(full / other))


def spread(values: NDArray[np.float64]) -> tuple[float, float]:
    """Where the middle half of some values lies: their quartiles."""
    low, high = np.percentile(values, (25, 75))
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of the DiT time without a cache: what the ``blocks`` of denoising passes take, and what whole ``passes`` take.

    The rest are KV updates.
    """

    blocks: float
    passes: float


class BlockClock:
    """Seconds spent in the blocks of denoising passes, or in the whole passes.

    On a GPU it sets marks among the work and waits for nothing, until its seconds are read.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu, self._seconds = device.type == "cuda", 0.0
        self._spans: list[tuple[Any, Any]] = []

    @property
    def seconds(self) -> float:
        if self._gpu and self._spans:
            torch.cuda.synchronize()
        self._seconds += sum(a.elapsed_time(b) / 1e3 if self._gpu else b - a for a, b in self._spans)
        self._spans.clear()
        return self._seconds

    def now(self) -> Any:
        if not self._gpu:
            return perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def add(self, start: Any, end: Any) -> None:
        self._spans.append((start, end))


@contextmanager
def clock_blocks(model: WorldModel, *, whole: bool = False) -> Iterator[BlockClock]:
    """Time the blocks of a model's denoising passes, or the ``whole`` passes, while the context is open.

    KV updates are left out.
    """
    clock, denoising = BlockClock(next(model.parameters()).device), True
    entered: Any = None

    def enter_pass(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal denoising
        denoising = not kwargs.get("write", False)

    def enter(_module: Any, _args: Any) -> None:
        nonlocal entered
        entered = clock.now()

    def leave(_module: Any, _args: Any, _output: Any) -> None:
        if denoising:
            clock.add(entered, clock.now())

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


def chunk_seconds(model: WorldModel, scenario: Scenario, config: LoopConfig) -> float:
    """The seconds of a chunk in full compute with this cadence: the mean of one cycle, after one chunk of warm-up."""
    start = scenario.start, scenario.start_actions
    loop = ClosedLoop(model, *start, config=config, track=scenario.track)
    loop.step(scenario.actions[0])
    return sum(loop.step(scenario.actions[0]).dit_seconds for _ in range(loop.window_frames)) / loop.window_frames

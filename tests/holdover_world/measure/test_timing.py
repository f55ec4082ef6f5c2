"""Cycles, ratios and bounds in closed form; block time on a model whose blocks are known to be slow."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

import holdover
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.scenarios import Scenario
from holdover_world.measure.timing import block_share, chunk_seconds, clock_blocks, cycles, speedup, spread, timed
from holdover_world.model.transformer import WorldModel


def loop(model: WorldModel) -> ClosedLoop:
    start = torch.zeros(1, 4, model.sizes.tokens, model.sizes.patch_values)
    return ClosedLoop(model, start, torch.zeros(1, 4, 2))


def test_cycles_average_whole_cycles_after_the_warm_up() -> None:
    seconds = np.array([9.0, 9, 1, 3, 2, 6, 7])
    assert cycles(seconds, 2).tolist() == [2.0, 4.0]  # the first is warm-up, the last is not whole
    assert cycles(seconds, 2, warm_up=0).tolist() == [9.0, 2.0, 4.0]
    with pytest.raises(ValueError, match="run at least 8"):
        cycles(seconds, 4)
    assert [*timed(7, 2)] == [2, 3, 4, 5]  # the chunks that were averaged
    assert [*timed(7, 2, warm_up=0)] == [0, 1, 2, 3, 4, 5]
    assert not timed(7, 4)


def test_speedup_is_the_median_ratio_of_cycles_side_by_side() -> None:
    assert speedup(np.array([4.0, 4, 400]), np.array([2.0, 2, 2])) == 2.0
    assert speedup(np.array([4.0, 8, 16]), np.array([2.0, 2, 8])) == 2.0  # their medians are 8 and 2


def test_the_spread_is_the_middle_half() -> None:
    assert spread(np.array([9.0, 1, 2, 3, 4])) == (2.0, 4.0)
    assert spread(np.array([5.0])) == (5.0, 5.0)


def test_the_blocks_of_denoising_passes_are_timed(model: WorldModel, monkeypatch: pytest.MonkeyPatch) -> None:
    block = model.blocks[1]
    original = block.forward

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return original(*args)

    monkeypatch.setattr(block, "forward", slow)
    running = loop(model)
    with clock_blocks(model) as clock:
        piece = running.step(torch.zeros(2))
    assert 4 * 0.02 <= clock.seconds <= piece.dit_seconds  # four denoising passes
    assert not model._forward_pre_hooks
    assert not block._forward_hooks
    with clock_blocks(model) as clock:  # a KV update alone does not count
        loop(model)
    assert clock.seconds == 0
    share, seconds = block_share(loop(model), torch.zeros(2), cycles=1)
    assert 0.5 < share < 1
    assert seconds > 0
    scenario = Scenario(
        name="x",
        start=torch.zeros(1, 4, model.sizes.tokens, model.sizes.patch_values),
        start_actions=torch.zeros(1, 4, 2),
        actions=torch.zeros(1, 2),
        truth=None,
    )
    assert chunk_seconds(model, scenario, LoopConfig()) > 4 * 0.02


def test_the_share_is_that_of_the_model_alone(model: WorldModel) -> None:
    running = loop(model)
    with holdover.attach(model, holdover.never()) as running.cache, pytest.raises(ValueError, match="without a cache"):
        block_share(running, torch.zeros(2))

"""Loops in one batch give what each gives alone. A state that was saved continues bit for bit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import holdover
from holdover_world.config import FRAMES
from holdover_world.loop.batch import advance, batches
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.state import LoopState
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.layout import Track
from tests.holdover_world.small import latents, small_layout, small_model

POLICY = holdover.xcache(tau_floor=0.9, tau_dev=1e9)
ACTIONS = torch.rand(12, 2, generator=torch.Generator().manual_seed(5))


def loop(model: WorldModel, cache: holdover.Cache | None, n: int, *, start: int = 4) -> ClosedLoop[WorldModel]:
    first = latents(model, start, seed=n)
    return ClosedLoop(model, first, torch.zeros(1, start, 2), seed=n, cache=cache, stream=str(n))


def drive(alone: ClosedLoop[WorldModel], count: int, offset: int) -> list[Tensor]:
    return [alone.step(ACTIONS[offset + n]).latents for n in range(count)]


def decisions(cache: holdover.Cache, stream: str) -> list[tuple[object, ...]]:
    return [(d.chunk, d.index, d.block, d.role, d.computed, d.reason) for d in cache.trace if d.stream == stream]


def test_a_batch_gives_each_loop_what_it_gets_alone() -> None:
    # The loops of each round. They join, leave and stand at different positions of their cycles.
    rounds = [[0], [0, 1], [0, 1, 2], [2, 0], [1, 2], [0, 1, 2], [2, 1, 0]]
    counts = {n: sum(n in members for members in rounds) for n in range(3)}
    model = small_model()
    with holdover.attach(model, POLICY) as cache:
        alone = {n: drive(loop(model, cache, n), count, n) for n, count in counts.items()}
        expected = {n: decisions(cache, str(n)) for n in counts}
    assert {reason for made in expected.values() for *_, reason in made} >= {"reuse", "kv cycle", "kv update"}
    model, rows = small_model(), []
    # Wrapped before the cache attaches, so that only computed rows are counted.
    inner, block = model.blocks[2].forward, model.blocks[2]
    block.forward = lambda hidden, shared: rows.append(len(hidden)) or inner(hidden, shared)  # type: ignore[method-assign]
    with holdover.attach(model, POLICY) as cache:
        loops = {n: loop(model, cache, n) for n in counts}
        together: dict[int, list[Tensor]] = {n: [] for n in counts}
        for members in rounds:
            chosen = [ACTIONS[n + len(together[n])] for n in members]
            assert batches([loops[n] for n in members]) == [list(range(len(members)))]
            for n, piece in zip(members, advance([loops[n] for n in members], chosen), strict=True):
                together[n].append(piece.latents)
        for n in counts:
            torch.testing.assert_close(torch.cat(together[n]), torch.cat(alone[n]), atol=1e-3, rtol=1e-3)
            assert decisions(cache, str(n)) == expected[n]
    needed = sum(made[2] == 2 and made[4] for each in expected.values() for made in each)
    assert sum(rows) == needed  # no row is computed because another one needs it


def test_loops_that_do_not_go_together() -> None:
    model = small_model()
    short, full = loop(model, None, 0, start=2), loop(model, None, 1)
    assert batches([short, full, short]) == [[0, 2], [1]]
    with pytest.raises(ValueError, match="a cache, a cadence and a KV length"):
        advance([short, full], [ACTIONS[0]] * 2)


@pytest.mark.parametrize("chunks", [2, 3])  # at the end of a cycle, and in the middle of one
def test_a_state_goes_on_bit_by_bit(chunks: int) -> None:
    model = small_model()
    config = LoopConfig(commit="last_full")
    original = ClosedLoop(model, latents(model, 4), torch.zeros(1, 4, 2), seed=3, config=config)
    drive(original, chunks, 0)
    state = original.state
    file = save({name: tensor.contiguous() for name, tensor in state.tensors().items()})
    expected = drive(original, 4, chunks)
    read = LoopState.from_tensors(load(file), model)
    resumed = ClosedLoop.resume(small_model(), read, config=config)
    assert all(torch.equal(a, b) for a, b in zip(drive(resumed, 4, chunks), expected, strict=True))
    original.state = state  # and back in place
    assert all(torch.equal(a, b) for a, b in zip(drive(original, 4, chunks), expected, strict=True))


def test_a_loop_goes_on_where_its_start_was_recorded() -> None:
    """The video depends on the layout, and a loop from a file continues in it."""
    model, layout = small_model(), small_layout(torch.tensor([[9.0, 1.0, 0.2, 1.0, 2.0, 0.0, 3.0, 0.9, 0.2, 0.2]]))
    track = Track(layout, torch.zeros(32, 3, dtype=torch.float64), torch.zeros(32, 2))
    actions = [torch.tensor([0.3, 0.1]), torch.tensor([0.3, -0.2]), torch.tensor([0.1, 0.0])]

    def located(track: Track | None) -> ClosedLoop[WorldModel]:
        return ClosedLoop(model, latents(model, 4), torch.zeros(1, 4, 2), seed=1, track=track)

    alone = located(track)
    made = [alone.step(action).latents for action in actions]
    assert not torch.allclose(made[0], located(None).step(actions[0]).latents, atol=1e-3)
    resumed = located(track)
    resumed.step(actions[0])
    resumed = ClosedLoop.resume(model, LoopState.from_tensors(resumed.state.tensors(), model))
    for action, piece in zip(actions[1:], made[1:], strict=True):
        torch.testing.assert_close(resumed.step(action).latents, piece)
    site = alone.history.sites[0]
    assert site is not None
    assert site.frame == 15 + 2 * FRAMES

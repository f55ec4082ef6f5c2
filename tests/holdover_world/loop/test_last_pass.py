"""The last denoising pass writes the KV cache in place of a clean pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import holdover
from holdover_world.loop.batch import advance
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.model.transformer import WorldModel
from tests.holdover_world.loop.test_driver import Noted, drive
from tests.holdover_world.small import latents, small_model

LAST = {"cadence": "plain", "kv": "last_pass"}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_last_pass_writes_and_no_other_follows(steps: int) -> None:
    pieces, spy = drive(small_model(), 3, steps=steps, **LAST)
    assert [call["write"] for call in spy.calls] == [True] * 2 + ([False] * (steps - 1) + [True]) * 3
    assert [call["sigma"] for call in spy.written[:2]] == [0, 0]  # the start is clean
    assert all(call["sigma"] > 0 for call in spy.written[2:])
    for piece, call in zip(pieces, spy.written[2:], strict=True):
        assert torch.equal(piece, call["output"])


def test_what_is_written_are_the_keys_of_the_noisy_pass_and_the_latents_that_it_predicts() -> None:
    """By hand: the same passes, of which the last writes."""
    model = small_model()
    start, command = latents(model, 2), torch.tensor([0.2, 0.6])
    run = ClosedLoop(model, start, torch.zeros(1, 2, 2), config=LoopConfig(steps=2, **LAST), seed=1)
    history, sigmas = run.history.fork(), run.sigmas
    noise = torch.randn(2, *start[:, :1].shape, generator=torch.Generator().manual_seed(1))
    told: dict[str, Any] = {"action_BFA": command.expand(1, 1, 2), "history": history}
    with torch.inference_mode():
        clean = model(noise[0], sigma=sigmas[0], **told)
        clean = model((1 - sigmas[1]) * clean + sigmas[1] * noise[1], sigma=sigmas[1], write=True, **told)
    piece = run.step(command)
    assert torch.equal(piece.latents, clean)
    assert torch.equal(run.last, clean[:, -1])
    held, by_hand = run.history.state_dict(), history.state_dict()
    assert held.keys() == by_hand.keys()
    assert all(torch.equal(held[name], by_hand[name]) for name in held)
    plain = ClosedLoop(model, start, torch.zeros(1, 2, 2), config=LoopConfig(steps=2, cadence="plain"), seed=1)
    assert torch.equal(plain.step(command).latents, clean)  # as with a clean pass, but for what was written
    written = plain.history.state_dict()
    assert any(not torch.equal(written[name], held[name]) for name in held if name.startswith("kv."))


def test_caches_are_told_that_it_writes() -> None:
    model, cache = small_model(), Noted()
    run = ClosedLoop(model, latents(model, 2), torch.zeros(1, 2, 2), config=LoopConfig(**LAST), cache=cache)
    run.step(torch.zeros(2))
    told = [(step.role, step.index, step.num_steps) for step in cache.steps[2:]]
    assert told == [("denoise", index, 3) for index in range(3)] + [("kv_update", 0, 1)]
    assert cache.steps[-1].sigma == run.sigmas[-1]


def test_it_is_never_served_from_cache() -> None:
    """Two of four passes are held; the last is computed, though the policy would hold it."""
    model, calls = small_model(), []
    for block in model.blocks[:1]:
        block.register_forward_hook(lambda *_: calls.append(1))
    with holdover.attach(model, holdover.policy("step_hold", hold=(1, 2, 3), last=False)) as cache:
        run = ClosedLoop(model, latents(model, 2), torch.zeros(1, 2, 2), config=LoopConfig(**LAST), cache=cache)
        calls.clear()
        list(run.run(torch.rand(3, 2)))
    assert len(calls) == 3 * 2
    assert [d.reason for d in cache.trace][2:6] == ["interval", "reuse", "reuse", "kv update"]


def test_a_batch_gives_each_loop_what_it_gets_alone() -> None:
    def loops(model: WorldModel) -> list[ClosedLoop[WorldModel]]:
        starts = [latents(model, 2) + 0.1 * n for n in range(2)]
        return [
            ClosedLoop(model, x, torch.zeros(1, 2, 2), config=LoopConfig(**LAST), seed=n) for n, x in enumerate(starts)
        ]

    model = small_model()
    alone, together = loops(model), loops(model)
    for _ in range(2):
        expected = [loop.step(torch.full((2,), 0.3 * n)) for n, loop in enumerate(alone)]
        made = advance(together, [torch.full((2,), 0.3 * n) for n in range(2)])
        for ours, theirs in zip(made, expected, strict=True):
            torch.testing.assert_close(ours.latents, theirs.latents, atol=1e-5, rtol=1e-5)
    assert torch.equal(together[1].last, made[1].latents[:, -1])


@pytest.mark.parametrize("changes", [{"cadence": "window"}, {"guidance": 2.0}])
def test_it_needs_the_plain_cadence_without_guidance(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="kv='last_pass' writes what the last pass saw; give cadence='plain'"):
        LoopConfig(**{**LAST, **changes})
    with pytest.raises(ValueError, match="kv='clear' is not one of clean, last_pass"):
        LoopConfig(kv="clear")  # type: ignore[arg-type]

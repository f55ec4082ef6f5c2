"""Writes into a KV cache that nobody announced, and KV updates that write what came from cache."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from tests.holdover.engine.models import EAGER, Scale, Stack, ones, reasons

# Writes that nobody announced.


class Appending(nn.Module):
    """Appends what it is given to a list or a dictionary, as some KV caches grow."""

    def forward(self, x: Tensor, *, cache: Any = None) -> Tensor:
        if isinstance(cache, list):
            cache.append(x)
        elif isinstance(cache, dict):
            cache.setdefault("k", []).append(x)
        return x * 2


@pytest.mark.parametrize("kind", [list, dict])
def test_a_block_that_appends_in_a_denoising_pass_is_refused(kind: Any) -> None:
    model = Stack(Appending(), Appending())
    with holdover.attach(model, EAGER) as cache:
        with cache.step(chunk=0, role="kv_update"):
            model(ones(), cache=kind())
        message = r"'blocks\.0' wrote into cache.*role='kv_update'.*writes_kv=True"
        with pytest.raises(ValueError, match=message), cache.step(chunk=1):
            model(ones(), cache=kind())
        with cache.step(chunk=1):
            model(ones())
    slots = [holdover.Slot(block, writes_kv=True) for block in model.blocks]
    with holdover.attach(model, EAGER, slots=slots) as cache, cache.step(chunk=0):
        model(ones(), cache=kind())


def test_a_block_that_was_reused_first_is_watched_when_it_is_computed() -> None:
    model = Stack(Appending())
    with holdover.attach(model, EAGER) as cache:
        with cache.step(chunk=0, commits=False):
            model(ones())
        snapshot = cache.snapshot()
    with holdover.attach(model, EAGER) as cache:
        cache.restore("default", snapshot)
        with cache.step(chunk=1, commits=False):
            model(ones())
        assert reasons(cache) == ["reuse"]
        with pytest.raises(ValueError, match="wrote into cache"), cache.step(chunk=2, commits=True):
            model(ones(), cache=[])


def test_a_tensor_in_a_dictionary_that_changes_in_place_is_a_write() -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor, *, cache: dict[str, Tensor]) -> Tensor:
            cache["k"][:] = x
            return x * 2

    model = Stack(Writing())
    with (
        holdover.attach(model, EAGER) as cache,
        pytest.raises(ValueError, match="wrote into cache in a denoising pass"),
        cache.step(chunk=0),
    ):
        model(ones(), cache={"k": ones()})


# The loop as documented.


class Loop(nn.Module):
    """Predicts clean latents, or a velocity, and writes its input into a KV cache."""

    def __init__(self, *, velocity: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Scale(1.5), Scale(0.7)])
        self.velocity = velocity

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        clean = x
        for block in self.blocks:
            clean = block(clean)
        return (x - clean) / sigma if self.velocity and sigma else clean

    def holdover_slots(self) -> list[nn.Module]:
        return list(self.blocks)


@pytest.mark.parametrize("velocity", [False, True])
@pytest.mark.parametrize("newest", [False, True])
def test_latents_from_cache_in_a_kv_update_are_told(velocity: bool, newest: bool) -> None:
    model, committed = Loop(velocity=velocity), ones()
    with holdover.attach(model, EAGER) as cache, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for n in range(8):
            latents = ones() + torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(n)) / 10
            for index, sigma in enumerate((1.0, 0.5)):
                with cache.step(chunk=n, index=index, num_steps=2, sigma=sigma, commits=n % 4 == 0):
                    output = model(latents, sigma)
                clean = latents - sigma * output if velocity else output
                latents = clean if index else 0.5 * clean + 0.5 * latents
            if n % 4 == 0 or newest:
                committed = latents
            if n % 4 == 3:
                with cache.step(chunk=n, role="kv_update"):
                    model(committed, 0.0)
    assert cache.stats().reused > 0
    messages = [str(warning.message) for warning in told]
    assert len(messages) == 2 * newest
    assert all("the latents of chunk" in text and "commits=True" in text for text in messages)


def test_a_fork_in_mid_cycle_knows_what_its_original_made(caplog: pytest.LogCaptureFixture) -> None:
    model, outputs = Loop(velocity=False), list[Tensor]()
    with holdover.attach(model, EAGER) as cache, warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(3):
            if n == 2:
                cache.fork("default", "fork")
            with cache.step(chunk=n, commits=n == 0, stream="fork" if n == 2 else "default"):
                outputs.append(model(ones(1 + n / 100), 1.0))
        with cache.step(chunk=2, role="kv_update", stream="fork"):
            model(outputs[0], 0.0)
    assert not caplog.records


def test_latents_that_cannot_be_told_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Loop(velocity=False)
    with holdover.attach(model, EAGER) as cache:
        for n in range(6):
            with cache.step(chunk=n, commits=n % 2 == 0):
                model(ones(n + 1), 1.0)
            if n % 2:
                with cache.step(chunk=n, role="kv_update"):
                    model(ones(100 + n) + torch.arange(6.0).view(1, 3, 2), 0.0)
    assert [record.getMessage()[:40] for record in caplog.records] == ["chunks 1 since the last KV update came f"]


@pytest.mark.parametrize("velocity", [False, True])
def test_rows_of_a_batch_are_told_each_for_itself(velocity: bool) -> None:
    """Stream b keeps what was generated last, a what was committed; they stand at different chunks."""
    model, starts = Loop(velocity=velocity), {"a": 0, "b": 10}
    committed = ones(batch=2)
    with holdover.attach(model, EAGER) as cache, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for n in range(4):
            latents = ones(batch=2) + torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(n)) / 10
            for index, sigma in enumerate((1.0, 0.5)):
                fields = {"index": index, "num_steps": 2, "sigma": sigma, "commits": n == 0}
                with cache.step(rows=[holdover.Step(stream=s, chunk=at + n, **fields) for s, at in starts.items()]):
                    output = model(latents, sigma)
                clean = latents - sigma * output if velocity else output
                latents = clean if index else 0.5 * clean + 0.5 * latents
            if n == 0:
                committed = latents.clone()
        committed[1] = latents[1]
        rows = [holdover.Step(stream=s, chunk=at + 3, role="kv_update") for s, at in starts.items()]
        with cache.step(rows=rows):
            model(committed, 0.0)
    assert cache.stats().reused > 0
    (message,) = (str(warning.message) for warning in told)
    assert message.startswith("the KV update writes the latents of chunk 13, which came from cache")

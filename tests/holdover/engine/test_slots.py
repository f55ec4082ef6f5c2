"""Blocks that do not simply take a hidden state first and return it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from holdover import Slot, ViewGroup
from holdover.engine.attach import attach

X = torch.linspace(-1, 1, 24).reshape(1, 6, 4)


class Pair(nn.Module):
    """Returns a count of its calls, then the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, write: bool = False) -> tuple[Any, Tensor]:
        self.calls += 1
        return {"calls": self.calls}, x + 1


class Chain(nn.Module):
    """Adds a hint to the hidden state between its blocks."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(blocks))
        self.told: list[Any] = []

    def forward(self, x: Tensor, hint: float = 0.0, write: bool = False) -> Tensor:
        for n, block in enumerate(self.blocks):
            said, x = block(x, write=write)
            self.told.append(said)
            if n < len(self.blocks) - 1:
                x = x + hint
        return x


def nothing(block: nn.Module, x: Tensor, write: bool = False) -> tuple[Any]:
    return ({},)


def slots(**fields: Any) -> list[Slot]:
    return [Slot(f"blocks.{n}", returns=1, beside=nothing, **fields) for n in range(3)]


def test_hidden_state_second_and_what_stands_beside_it_when_reused() -> None:
    model = Chain()
    with holdover.attach(
        model, holdover.fixed_interval(over="steps", every=2, protection="pass", warmup=0), slots=slots()
    ) as cache:
        for index in range(2):
            with cache.step(chunk=0, index=index, num_steps=2):
                out = model(X + index)
    assert torch.allclose(out, X + 4)
    assert model.told == [{"calls": 1}] * 3 + [{"calls": 2}, {}, {}]


def test_what_the_model_does_between_blocks_is_counted_once() -> None:
    model = Chain()
    policy = holdover.fixed_interval(over="steps", every=2, span="all", front_anchors=0, protection="pass", warmup=0)
    with holdover.attach(model, policy, slots=slots()) as cache:
        for index in range(2):
            with cache.step(chunk=0, index=index, num_steps=2):
                out = model(X, hint=10.0)
    assert cache.stats().reused == 3
    assert torch.allclose(out, X + 23)


def test_a_kv_write_in_a_denoising_step_is_refused() -> None:
    model = Chain()
    with holdover.attach(model, holdover.never(), slots=slots(kv_update=lambda block, x, write: write)) as cache:
        with pytest.raises(ValueError, match="writes the KV cache within a denoising step"), cache.step(chunk=0):
            model(X, write=True)
        with cache.step(chunk=0, role="kv_update"):
            model(X, write=True)
    assert cache.stats().reasons == {"kv update": 3}


def test_view_groups_may_follow_the_input() -> None:
    model = Chain()
    asked: list[tuple[int, ...]] = []

    def groups(module: nn.Module, x: Tensor, **kwargs: Any) -> list[ViewGroup]:
        asked.append(tuple(x.shape))
        return [ViewGroup("video", 1, 2, x.shape[1] // 2)]

    before = dict(model.__dict__)
    with attach(model, holdover.xcache(), slots=slots(), view_groups=groups) as cache:
        for tokens in (6, 8):
            with cache.step(chunk=tokens):
                model(torch.ones(1, tokens, 4))
    assert asked == [(1, 6, 4), (1, 8, 4)]
    assert {key: value for key, value in model.__dict__.items() if key != "told"} == {
        key: value for key, value in before.items() if key != "told"
    }
    model(X)
    assert len(asked) == 2
    with attach(model, holdover.policy("fbcache"), slots=slots(), view_groups=groups) as cache, cache.step(chunk=0):
        model(X)
    assert len(asked) == 2  # it does not look at the layout

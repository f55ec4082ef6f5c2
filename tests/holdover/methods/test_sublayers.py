"""What lies within blocks: PAB's kinds of attention and ToCa's tokens; and the deep part of a U-Net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import holdover
from holdover import Slot, Step
from tests.holdover.engine.models import Scale, Stack


class Counted(nn.Module):
    """``x -> 2x``, token by token; counts the tokens it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.tokens.append(x.shape[1])
        return 2 * x


def tokens(*values: float) -> Tensor:
    return torch.tensor(values).reshape(1, -1, 1)


def mlp_alone(inputs: list[Tensor], **options: Any) -> tuple[list[list[float]], list[int], holdover.Cache]:
    """What an MLP gives under ToCa, with how many tokens it computed at a time."""
    model = Counted()
    slot, outputs = Slot(model, kind="mlp"), []
    with holdover.attach(model, holdover.policy("toca", every=99, **options), slots=[slot]) as cache:
        for index, x in enumerate(inputs):
            with cache.step(chunk=0, index=index, num_steps=len(inputs)):
                outputs.append(model(x).flatten().tolist())
    return outputs, model.tokens, cache


def test_the_tokens_with_the_largest_features_are_computed_and_held_from_then_on() -> None:
    inputs = [tokens(1, 5, 3, -4), tokens(2, 0, 7, 8), tokens(9, 9, 9, 9)]
    outputs, counts, cache = mlp_alone(inputs, fresh=0.5, age=0.0)
    assert counts == [4, 2, 2]
    # First those that gave 10 and -8; then those that gave 16 and, of what is held by now, 6.
    assert outputs == [[2, 10, 6, -8], [2, 0, 6, 16], [2, 0, 18, 18]]
    assert [dict(d.scores) for d in cache.trace] == [{}, {"recomputed": 0.5}, {"recomputed": 0.5}]


def test_with_age_alone_every_token_has_its_turn() -> None:
    inputs = [tokens(*range(1, 7)) + 10 * index for index in range(4)]
    outputs, counts, _ = mlp_alone(inputs, fresh=0.3, age=1e6)
    assert counts == [6, 2, 2, 2]  # 1.8 tokens, rounded up
    computed_at = [int(y - 2 * (token + 1)) // 20 for token, y in enumerate(outputs[-1])]
    assert sorted(computed_at) == [1, 1, 2, 2, 3, 3]


def test_all_tokens_fresh_is_the_model_and_none_is_a_repeat() -> None:
    inputs = [tokens(1, 2), tokens(3, 5)]
    assert mlp_alone(inputs, fresh=1.0)[0] == [[2, 4], [6, 10]]
    assert mlp_alone(inputs, fresh=0.0)[0] == [[2, 4], [2, 4]]


def test_each_kind_of_attention_is_computed_at_its_own_interval() -> None:
    model = Stack(*(Scale() for _ in range(4)))
    kinds = ("spatial", "temporal", "cross", "mlp")
    slots = [Slot(block, kind=kind) for block, kind in zip(model.blocks, kinds, strict=True)]
    with holdover.attach(model, holdover.policy("pab", start=0.1, stop=0.9), slots=slots) as cache:
        for index in range(20):
            with cache.step(chunk=0, index=index, num_steps=20):
                model(torch.full((1, 3, 2), float(index)))
    computed = {kind: [d.index for d in cache.trace if d.block == n and d.computed] for n, kind in enumerate(kinds)}
    ends = [0, 1, 18, 19]
    assert computed["spatial"] == sorted({*ends, *range(2, 18, 2)})
    assert computed["temporal"] == sorted({*ends, 4, 8, 12, 16})
    assert computed["cross"] == sorted({*ends, 6, 12})
    assert computed["mlp"] == list(range(20))


def test_a_policy_takes_the_slots_of_its_level() -> None:
    class Declares(Stack):
        def holdover_slots(self) -> list[Any]:
            return [self.blocks[0], Slot(self.blocks[1], kind="cross")]

    model = Declares(Scale(), Scale())
    with holdover.attach(model, holdover.never()) as cache, cache.step(chunk=0):
        model(torch.ones(1, 3, 2))
    assert [d.slot for d in cache.trace] == ["blocks.0"]
    with holdover.attach(model, holdover.policy("pab")) as cache, cache.step(chunk=0):
        model(torch.ones(1, 3, 2))
    assert [d.slot for d in cache.trace] == ["blocks.1"]
    with pytest.raises(ValueError, match="Stack declares no slots of level 'sublayer'"):
        holdover.attach(Stack(Scale()), holdover.policy("pab"))
    with pytest.raises(ValueError, match="kind='attention' of a slot is not one of model, block, spatial"):
        Slot(model, kind="attention")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pab", {"start": 0.9, "stop": 0.1}, "start=0.9, stop=0.1"),
        ("pab", {"cross": 0}, "cross=0: give a whole number"),
        ("toca", {"fresh": 1.2}, "fresh=1.2 is not a share"),
        ("toca", {"age": -1.0}, "age=-1.0 is negative"),
        ("deepcache", {"shallow": -1}, "shallow=-1: give a whole number"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        holdover.policy(name, **options)


def test_a_deep_part_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="shallow=1 leaves none of the model's 2 blocks"):
        holdover.attach(Stack(Scale(), Scale()), holdover.policy("deepcache"))


def test_streams_of_a_batch_choose_their_own_tokens() -> None:
    inputs = [torch.stack([tokens(1, 5, 3)[0], tokens(4, 2, 9)[0]]) * (1 + index) for index in range(4)]
    model = Counted()
    options = {"every": 99, "fresh": 0.3, "age": 0.1}

    def run(**attach: Any) -> list[Tensor]:
        outputs = []
        with holdover.attach(model, holdover.policy("toca", **options), slots=[Slot(model, kind="mlp")]) as cache:
            for index, x in enumerate(inputs):
                rows = [Step(chunk=0, index=index, num_steps=4, stream=name) for name in attach["streams"]]
                with cache.step(rows=rows):
                    outputs.append(model(x[attach["rows"]]))
        return outputs

    together = run(streams=["a", "b"], rows=slice(None))
    apart = [run(streams=["a"], rows=slice(0, 1)), run(streams=["b"], rows=slice(1, 2))]
    for both, first, second in zip(together, *apart, strict=True):
        assert torch.equal(both, torch.cat([first, second]))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_every_token_is_either_computed_or_repeated(length: int, fresh: float, seed: int) -> None:
    """As many as the share says, rounded up, are computed, whatever the values."""
    values = torch.randn(2, length, generator=torch.Generator().manual_seed(seed)).tolist()
    outputs, counts, _ = mlp_alone([tokens(*row) for row in values], fresh=fresh)
    then, now = ([2 * value for value in row] for row in values)
    computed = [y == new for y, old, new in zip(outputs[1], then, now, strict=True) if y in (old, new)]
    assert len(computed) == length
    assert counts == [length, *([sum(computed)] if computed else [])]
    assert fresh * length - 1e-6 <= sum(computed) < fresh * length + 1

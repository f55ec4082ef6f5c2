"""A condition that changes is noticed, whatever it is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import holdover
from tests.holdover.engine.models import EAGER, Scale, Stack, ones, reasons

PAIRS = [
    ("rain", "snow"),
    (None, "rain"),
    (1, True),
    (torch.zeros(3), torch.tensor([0.0, 0.0, 1.0])),
    (torch.zeros(3), torch.zeros(4)),
    (torch.zeros(3), torch.zeros(3, dtype=torch.float64)),
    (torch.zeros(3), None),
    (np.zeros(3), np.ones(3)),
    ({"map": torch.zeros(2), "text": "a"}, {"map": torch.ones(2), "text": "a"}),
    ({"map": torch.zeros(2)}, {"map": torch.zeros(2), "text": "a"}),
    (["a", torch.zeros(2)], ["a", torch.ones(2)]),
    (("a",), ("a", "b")),
    ({"agents": {"x": [torch.zeros(1)]}}, {"agents": {"x": [torch.ones(1)]}}),
]


def play(cache: holdover.Cache, model: torch.nn.Module, *conditions: Any, start: int = 0, **fields: Any) -> None:
    for chunk, condition in enumerate(conditions, start):
        with cache.step(chunk=chunk, commits=False, condition=condition, **fields):
            model(ones())


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_change_is_computed_and_the_same_is_not(before: Any, after: Any) -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        play(cache, model, before, copy.deepcopy(before), after, copy.deepcopy(after), before)
    assert reasons(cache) == ["first", "reuse", "condition", "reuse", "condition"]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_snapshot_knows_the_condition(before: Any, after: Any) -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        play(cache, model, before)
        snapshot = cache.snapshot()
        cache.restore("same", snapshot)
        cache.restore("other", snapshot)
        play(cache, model, copy.deepcopy(before), copy.deepcopy(before), after, stream="same", start=1)
        play(cache, model, after, stream="other", start=1)
    assert reasons(cache) == ["first", "reuse", "reuse", "condition", "condition"]


def test_a_condition_without_a_plain_form_counts_as_changed_after_a_restore() -> None:
    model, condition = Stack(Scale()), frozenset({1})
    with holdover.attach(model, EAGER) as cache:
        play(cache, model, condition, condition)
        cache.restore("later", cache.snapshot())
        play(cache, model, condition, condition, stream="later", start=2)
    assert reasons(cache) == ["first", "reuse", "condition", "reuse"]


@pytest.mark.parametrize("overwrite", [lambda t: t.fill_(1), lambda t: t.add_(1)])
def test_a_tensor_overwritten_in_place_is_a_change(overwrite: Callable[[torch.Tensor], Any]) -> None:
    model, condition = Stack(Scale()), torch.zeros(3)
    with holdover.attach(model, EAGER) as cache:
        play(cache, model, condition)
        overwrite(condition)
        play(cache, model, condition, start=1)
    assert reasons(cache) == ["first", "condition"]


def test_nan_is_never_the_same() -> None:
    model, condition = Stack(Scale()), torch.tensor([float("nan")])
    with holdover.attach(model, EAGER) as cache:
        play(cache, model, condition, condition)
    assert reasons(cache) == ["first", "condition"]


def test_a_change_in_mid_chunk_computes_its_rest_and_every_older_slot() -> None:
    model = Stack(Scale())
    passes = [(0, i, "a") for i in range(3)] + [(1, 0, "a"), (1, 1, "b"), (1, 2, "b")] + [(2, i, "b") for i in range(3)]
    with holdover.attach(model, EAGER) as cache:
        for chunk, index, condition in passes:
            with cache.step(chunk=chunk, index=index, num_steps=3, commits=False, condition=condition):
                model(ones())
    # ChunkState 2 recomputes pass 0, which chunk 1 reused under the old condition.
    assert reasons(cache) == ["first"] * 3 + ["reuse"] + ["condition"] * 2 + ["condition", "reuse", "reuse"]


def test_branches_have_conditions_of_their_own() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        for chunk, text in enumerate(["rain", "rain", "snow"]):
            play(cache, model, text, start=chunk, branch="cond")
            play(cache, model, "", start=chunk, branch="uncond")
    assert [d.reason for d in cache.trace if d.branch == "cond"] == ["first", "reuse", "condition"]
    assert [d.reason for d in cache.trace if d.branch == "uncond"] == ["first", "reuse", "reuse"]


def test_a_condition_that_cannot_be_compared_is_refused() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache, pytest.raises(ValueError, match="condition holds a set"):
        play(cache, model, {1, 2})
    assert model(ones())[0, 0, 0] == 2

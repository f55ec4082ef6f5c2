"""A user's loop, run with and without a cache."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import holdover
from holdover import Step, cli
from holdover.tune.loop import from_factory, relative_error, run
from tests.holdover.engine.models import Scale, Stack, ones
from tests.holdover.tune.toys import many_chunks


def test_a_run_is_the_same_with_a_cache_that_reuses_nothing() -> None:
    model, loop = many_chunks()
    alone, attached = run(model, loop), run(model, loop, holdover.never())
    assert all(map(torch.equal, alone.output, attached.output))
    places = [[(each.role, each.stream, each.chunk, each.index) for each in of.passes] for of in (alone, attached)]
    assert places[0] == places[1]
    assert [place[0] for place in places[0]].count("kv_update") == 2
    assert alone.stats is None
    assert attached.stats is not None
    assert attached.stats.computed == len(alone.passes) * 4
    assert not [name for name, module in model.named_modules() if module._forward_pre_hooks]


class Slow(Scale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return super().forward(x)


@pytest.mark.parametrize("policy", [None, holdover.never()])
def test_the_time_is_that_of_the_passes_alone(policy: Any) -> None:
    model = Stack(Slow())

    def loop(cache: holdover.Cache) -> None:
        for chunk in range(2):
            time.sleep(0.2)
            with cache.step(chunk=chunk):
                model(ones())

    timed = run(model, loop, policy)
    assert [each.seconds >= 0.01 for each in timed.passes] == [True, True]
    assert 0.02 <= timed.seconds < 0.2


def test_loops_may_ask_a_cache_that_is_not_there() -> None:
    """What a loop asks of a cache has an answer where nothing is attached: everything was computed."""
    model = Stack(Scale())
    asked = []

    def loop(cache: holdover.Cache) -> None:
        with cache.step(rows=[Step(chunk=3, stream="a"), Step(chunk=3, stream="b")]):
            model(ones(batch=2))
        asked.append(cache.exact("a"))
        cache.give_up(3, "a")
        cache.reset("a")

    assert [(each.stream, each.chunk) for each in run(model, loop).passes] == [("a", 3)]
    assert [(each.stream, each.chunk) for each in run(model, loop, holdover.never()).passes] == [("a", 3)]
    assert asked == [True, True]


def test_the_error_is_relative_over_all_tensors() -> None:
    reference = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    assert relative_error([torch.tensor([3.0]), torch.tensor([[4.5]])], reference) == pytest.approx(0.1)
    assert relative_error(reference, reference) == 0
    with pytest.raises(ValueError, match="returned no tensor"):
        relative_error([], [])
    with pytest.raises(ValueError, match=r"returned shapes \[\(2,\)\], and \[\(1,\)\] without a cache"):
        relative_error([torch.ones(2)], [torch.ones(1)])


@pytest.mark.parametrize("made", [np.ones(3), {"a": [torch.ones(2)], "b": (torch.ones(1),), "c": "text"}])
def test_tensors_are_found_in_what_a_loop_returns(made: object) -> None:
    found = run(nn.Linear(1, 1), lambda cache: made).output
    assert sum(tensor.numel() for tensor in found) == 3


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("tests.holdover", "'tests.holdover' names no function; give package.module:function"),
        ("tests.holdover:none", "'tests.holdover:none': the module tests.holdover has no function 'none'"),
        ("tests.holdover.tune.toys:nothing", "returned NoneType; return a model and a function of the cache"),
    ],
)
def test_wrong_factories_are_refused(factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_factory(factory)
    for command in ("calibrate", "overhead", "compare"):
        result = CliRunner().invoke(cli.app, [command, factory])
        assert result.exit_code == 2
        assert message in result.stderr

"""Nothing approximate reaches the KV cache."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import holdover
from tests.holdover.conformance.runs import each, kv_tensors, play, same
from tests.holdover.registry import DEFAULTS, VARIED, Case
from tests.holdover.toy import ToyModel, cached


@pytest.mark.parametrize("case", DEFAULTS + VARIED, ids=lambda case: case.id)
def test_kv_updates_are_computed_in_full(case: Case, model: ToyModel) -> None:
    with holdover.attach(model, case.policy()) as cache:
        play(model, case.loop(), cached(cache), case.length)
    updates = [decision for decision in cache.trace if decision.role == "kv_update"]
    blocks = {(decision.branch, decision.block) for decision in cache.trace}
    assert len(updates) == len(blocks) * case.length // 4
    assert all(decision.computed and decision.reason == "kv update" for decision in updates)


@each
def test_poison_never_reaches_the_kv_cache(case: Case, model: ToyModel) -> None:
    expected, policy = case.loop(), case.protected().policy()
    with holdover.attach(model, policy) as cache:
        play(model, expected, cached(cache), 8)
    loop = case.loop()
    with holdover.attach(model, policy) as cache:
        play(model, loop, cached(cache), 4)
        play(model, loop, poisoned(cache, everything=True), 1)  # protected: it uses none of the poison
        outputs = play(model, loop, poisoned(cache, everything=False), 3)
    assert all(tensor.isfinite().all() for tensor in kv_tensors(loop))
    assert same(kv_tensors(loop), kv_tensors(expected))
    if case.name in ("easycache", "bwcache"):  # their gates look at the outputs that the predictor holds
        assert all(output.isfinite().all() for output in outputs)
    elif case.name != "never":
        assert any(output.isnan().any() for output in outputs)  # the poison was real


@each
def test_a_poisoned_signal_is_computed_and_other_poison_shows(case: Case, model: ToyModel) -> None:
    with holdover.attach(model, case.policy()) as cache:
        loop = case.loop()
        play(model, loop, cached(cache), 5)
        before = cache.stats()
        outputs = play(model, loop, poisoned(cache, everything=True), 1)
        after = cache.stats()
    if case.policy().trigger.signal is not None:
        assert after.reused == before.reused
        assert after.reasons["nan"] > 0
    assert all(output.isfinite().all() for output in outputs) == (after.reused == before.reused)


def poisoned(cache: holdover.Cache, *, everything: bool) -> Any:
    """Runs every pass after poisoning all that is held."""

    def runner(fields: dict[str, Any], run: Any) -> Tensor:
        poison(cache, everything=everything)
        return cached(cache)(fields, run)

    return runner


def poison(cache: holdover.Cache, *, everything: bool) -> None:
    """Fill what is held with NaN: every tensor, or all but the signal, which is what a gate can see."""
    for stream in cache._runtimes[0].streams.values():
        for held in stream.entries.values():
            remembered = (item for own in held.memory.values() for item in own.items())
            for name, tensor in (*held.tensors.items(), *remembered):
                if tensor.is_floating_point() and (everything or name != "signal"):
                    tensor.fill_(float("nan"))

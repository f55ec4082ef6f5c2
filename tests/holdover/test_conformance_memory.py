"""What every registered policy must pass that runs for days, or on a host with other threads."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator, Sized
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from holdover.engine import streams
from tests.holdover.case import Case
from tests.holdover.registry import DEFAULTS
from tests.holdover.toy import FEW, PER_FRAME, Runner, ToyLoop, ToyModel, cached, one_thread

each = pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.id)
barren = pytest.mark.filterwarnings("ignore:.* could reuse nothing")

#: Decisions that the trace keeps, and chunks that a stream does: both are full after a cycle or two.
LIMIT, RECENT = 50, 4
#: What a count of them tells nothing of: each stands in a container, which is counted.
PLAIN = int | float | str | type | types.ModuleType | types.FunctionType | nn.Module | Tensor


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def actions(count: int) -> list[tuple[float, float]]:
    """The same in every cycle."""
    return [(0.5, (0.0, 0.01, 0.02, 0.01)[n % 4]) for n in range(count)]


def things(cache: holdover.Cache) -> int:
    """How many objects a cache holds on the host, and items in them, its trace left out."""
    roots: list[Any] = [cache._written._made]
    for runtime in cache._runtimes:
        roots += [runtime.streams, runtime.tallies, runtime.alike, runtime._signals_of, vars(runtime.shortcuts)]
    found: dict[int, Any] = {}
    while roots:
        item = roots.pop()
        if id(item) in found or isinstance(item, PLAIN):
            continue
        found[id(item)] = item
        roots += gc.get_referents(item)
    return len(found) + sum(len(item) for item in found.values() if isinstance(item, Sized))


@barren
@each
def test_a_million_decisions_take_no_more_memory_than_the_first_thousands(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trace is a ring, and of everything else a cycle leaves what the one before it left."""
    monkeypatch.setattr(streams, "RECENT", RECENT)
    span = 3 if case.sigmas is FEW else 2  # what is held comes and goes: compared are so many together
    model, loop = ToyModel(), case.loop()
    most: list[tuple[int, int, int]] = []  # per cycle: rows, things, bytes of tensors
    with holdover.attach(model, case.policy(), trace=LIMIT) as cache:
        for _ in range(3 * span):
            rows = held = 0

            def runner(fields: dict[str, Any], run: Any) -> Tensor:
                nonlocal rows, held
                output = cached(cache)(fields, run)
                rows, held = max(rows, len(cache.trace)), max(held, cache.nbytes)
                return output

            for action in actions(4 if case.sigmas is FEW else 2):
                loop.step(model, action, runner)
            most.append((rows, things(cache), held))
        per_pass = len({decision.block for decision in cache.trace})
        total = cache.stats().computed + cache.stats().reused
        assert total == len(cache.trace) + cache.trace.dropped > 3 * LIMIT
    assert max(rows for rows, _, _ in most) <= LIMIT + LIMIT // 4 + per_pass
    for column, slack in ((1, 4), (2, 0)):  # one thing may be held at times
        before, after = (max(each[column] for each in part) for part in (most[-2 * span : -span], most[-span:]))
        assert after <= before + slack


@barren
@each
def test_another_thread_is_told_and_changes_nothing(case: Case) -> None:
    """It tries what it can while a step is open; what the first one does is as if it had not."""

    def run(model: ToyModel, runner: Runner) -> list[Tensor]:
        loop = case.loop()
        return [loop.step(model, action, runner) for action in actions(6 if case.sigmas is FEW else 2)]

    model = ToyModel()
    with holdover.attach(model, case.policy()) as cache:
        expected, decided = run(model, cached(cache)), list(cache.trace)
    told: list[str] = []
    with holdover.attach(model, case.policy()) as cache:

        def intrude() -> None:
            x = torch.zeros(1, PER_FRAME, 6)
            for attempt in (
                lambda: cache.step(chunk=0, stream="other").__enter__(),
                lambda: cache.reset(),
                lambda: cache.fork("default", "fork"),
                lambda: model(x, sigma=1.0, action=torch.zeros(1, 2)),
            ):
                with pytest.raises(ValueError, match="two threads") as error:
                    attempt()
                told.append(str(error.value))

        def disturbed(fields: dict[str, Any], run: Any) -> Tensor:
            def within(**more: Any) -> Tensor:
                thread = Thread(target=intrude)
                thread.start()
                thread.join()
                output: Tensor = run(**more)
                return output

            return cached(cache)(fields, within)

        outputs = run(model, disturbed)
        assert not cache.in_step
        assert cache.streams == ("default",)
        assert all(map(torch.equal, outputs, expected))
        assert [vars_of(decision) for decision in cache.trace] == [vars_of(decision) for decision in decided]
        assert len(told) % 4 == 0
        assert told


def vars_of(decision: Any) -> tuple[Any, ...]:
    return decision.branch, decision.chunk, decision.index, decision.block, decision.reason, dict(decision.scores)


@barren
@each
def test_threads_may_take_turns(case: Case) -> None:
    model = ToyModel()
    with holdover.attach(model, case.policy()) as cache:
        expected = play(model, case.loop(), cached(cache))
    with holdover.attach(model, case.policy()) as cache:
        outputs, loop = list[Tensor](), case.loop()
        for action in actions(3):
            thread = Thread(target=lambda action=action: outputs.append(loop.step(model, action, cached(cache))))
            thread.start()
            thread.join()
    assert len(outputs) == 3
    assert all(map(torch.equal, outputs, expected))


def play(model: ToyModel, loop: ToyLoop, runner: Runner) -> list[Tensor]:
    return [loop.step(model, action, runner) for action in actions(3)]

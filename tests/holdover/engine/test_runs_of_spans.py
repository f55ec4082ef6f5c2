"""Several spans at once: a run of blocks is decided from the input of the first, and one sum stands in for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import holdover
from holdover.method import Policy
from tests.holdover.toy import BLOCKS, ToyLoop, ToyModel, cached, drive, one_thread

CHUNKS = 20


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def ahead(spans: int) -> Policy:
    return replace(holdover.xcache(), look_ahead=spans)


def play(model: ToyModel, cache: holdover.Cache, loop: ToyLoop, chunks: int) -> list[Tensor]:
    return [loop.step(model, action, cached(cache)) for action in drive(chunks, loop.chunk)]


@pytest.mark.parametrize("spans", [2, 3, BLOCKS])
def test_decisions_are_those_of_block_after_block(spans: int) -> None:
    runs = []
    for policy in (ahead(1), ahead(spans)):
        model = ToyModel()
        with holdover.attach(model, policy) as cache:
            outputs = play(model, cache, ToyLoop(), CHUNKS)
        runs.append((outputs, cache))
    (expected, alone), (outputs, cache) = runs
    assert [(d.chunk, d.index, d.block, d.reason) for d in cache.trace] == [
        (d.chunk, d.index, d.block, d.reason) for d in alone.trace
    ]
    for own, other in zip(cache.trace, alone.trace, strict=True):
        assert own.scores == pytest.approx(dict(other.scores), rel=1e-3, abs=1e-4)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    assert cache.stats().reused > 100


def test_a_run_reads_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, tolist = [], Tensor.tolist
    counts = []
    for policy in (ahead(1), ahead(BLOCKS)):
        model = ToyModel()
        with holdover.attach(model, policy) as cache:
            loop = ToyLoop()
            play(model, cache, loop, 1)
            with monkeypatch.context() as patch:
                patch.setattr(Tensor, "tolist", lambda self: reads.append(self) or tolist(self))
                reads.clear()
                play(model, cache, loop, 1)
        decided = [d for d in cache.trace if d.chunk == 1 and d.scores]
        actions = 4  # each step's action is read as numbers
        counts.append((len(reads) - actions, len(decided), {d.reason for d in decided}))
    asked = 4 * (BLOCKS - 1)  # all but the anchor
    assert counts[0] == (asked, asked, {"reuse"})
    assert counts[1] == (4, asked, {"reuse"})  # one run a pass


def test_one_sum_stands_in_for_a_run() -> None:
    """In a run, blocks between the first and the last give back what they are given."""
    model = ToyModel()
    with holdover.attach(model, ahead(BLOCKS)) as cache:
        loop = ToyLoop()
        play(model, cache, loop, 1)
        seen: list[Tensor] = []
        model.blocks[BLOCKS - 1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        play(model, cache, loop, 1)
    for first, last in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(first, last)


def test_a_run_ends_at_the_first_block_that_must_be_computed() -> None:
    """Its verdict came with those before it, and is not asked for again."""
    model = ToyModel()
    with holdover.attach(model, replace(holdover.xcache(tau_dev=0.22, alpha=1.0), look_ahead=BLOCKS)) as cache:
        play(model, cache, ToyLoop(), CHUNKS)
    with holdover.attach(model, replace(holdover.xcache(tau_dev=0.22, alpha=1.0), look_ahead=1)) as alone:
        play(model, alone, ToyLoop(), CHUNKS)
    assert [d.reason for d in cache.trace] == [d.reason for d in alone.trace]
    assert cache.stats().reasons["deviation"] > 5
    assert cache.stats().reused > 20


def test_snapshots_and_forks_work_with_runs(tmp_path: Path) -> None:
    model, loop = ToyModel(), ToyLoop()
    with holdover.attach(model, ahead(3)) as cache:
        play(model, cache, loop, 5)
        cache.snapshot().save(tmp_path / "snapshot")
        cache.fork("default", "fork")
        later, forked = copy.deepcopy(loop), copy.deepcopy(loop)
        forked.stream = "fork"
        expected = play(model, cache, loop, 3)
        assert all(map(torch.equal, play(model, cache, forked, 3), expected))
    with holdover.attach(model, ahead(3)) as cache:
        cache.restore("default", holdover.Snapshot.load(tmp_path / "snapshot"))
        assert all(map(torch.equal, play(model, cache, later, 3), expected))
        assert cache.stats().reused > 20


def test_looking_ahead_takes_a_linear_signal() -> None:
    with pytest.raises(ValueError, match="look_ahead=2 of fbcache: give 1, or more where the signal is linear"):
        replace(holdover.policy("fbcache"), look_ahead=2)
    with pytest.raises(ValueError, match="look_ahead=0"):
        replace(holdover.xcache(), look_ahead=0)

"""Chunks that run no pass: noted as what they are, counted apart, and nothing to the policy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import holdover
from holdover.report.decisions import skip_by_block, skip_rate
from tests.holdover.engine.models import EAGER, Scale, Stack, ones


def run(model: Stack, cache: holdover.Cache, chunk: int, stream: str = "default") -> None:
    for index in range(2):
        with cache.step(chunk=chunk, index=index, num_steps=2, commits=False, stream=stream):
            model(ones())


def test_a_chunk_without_passes_is_noted_and_counted_apart() -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, EAGER) as cache:
        run(model, cache, 0)
        cache.hold(chunk=1, num_steps=2)
        run(model, cache, 2)
        cache.hold(chunk=3, num_steps=2, branches=("", "uncond"))
        stats = cache.stats()
    assert model.blocks[0].calls == 2
    noted = [(d.chunk, d.branch, d.index, d.block, d.slot, d.role) for d in cache.trace if d.reason == "window"]
    assert noted == [
        (chunk, branch, index, block, f"blocks.{block}", "denoise")
        for chunk, branches in ((1, ("",)), (3, ("", "uncond")))
        for index in range(2)
        for branch in branches
        for block in range(2)
    ]
    assert [(d.computed, d.reused) for d in cache.trace] == (
        [(True, False)] * 4 + [(False, False)] * 4 + [(False, True)] * 4 + [(False, False)] * 8
    )
    assert (stats.computed, stats.reused, stats.held_chunks) == (4, 4, 2)
    assert stats.reasons == {"first": 4, "reuse": 4}
    assert stats.skip == skip_rate(cache.trace) == 0.5
    assert skip_by_block(cache.trace, 2).tolist() == [0.5, 0.5]
    assert skip_rate([d for d in cache.trace if d.chunk == 1]) is None


def test_a_policy_does_not_count_it() -> None:
    """Neither for warm-up nor for staleness."""
    model = Stack(Scale())
    with holdover.attach(model, holdover.xcache(front_anchors=0, warmup=2, max_staleness=1)) as cache:
        for chunk in range(12):
            if chunk in (0, 3, 6, 9):
                run(model, cache, chunk)
            else:
                cache.hold(chunk=chunk, num_steps=2)
    reasons = {chunk: Counter(d.reason for d in cache.trace if d.chunk == chunk) for chunk in range(12)}
    assert [dict(reasons[chunk]) for chunk in (0, 3, 6, 9)] == [
        {"warm-up": 2}, {"warm-up": 2}, {"reuse": 2}, {"stale": 2},
    ]  # fmt: skip


def test_every_policy_of_several_notes_its_own_slots_and_it_counts_once() -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, [holdover.policy("worldcache_htc"), EAGER]) as cache:
        run(model, cache, 0)
        cache.hold(chunk=1, num_steps=2)
        assert cache.stats().held_chunks == 1
    slots = Counter(d.slot for d in cache.trace if d.reason == "window")
    assert len(slots) == 3
    assert slots == dict.fromkeys({d.slot for d in cache.trace if d.chunk == 0}, 2)


def test_it_may_still_be_exact() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        for chunk, exact in ((0, True), (2, False)):
            run(model, cache, chunk)
            assert cache.exact() is exact
            cache.hold(chunk=chunk + 1, num_steps=2)
            assert cache.exact() is exact  # what is shown was made by the chunk before


def test_a_number_is_used_once(tmp_path: Path) -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        with pytest.raises(ValueError, match="no stream 'default'"):
            cache.hold(chunk=0)
        run(model, cache, 0)
        with pytest.raises(ValueError, match="chunk 0 of stream 'default' ran passes, so it is not held"):
            cache.hold(chunk=0)
        cache.hold(chunk=1)
        cache.fork("default", "twin")
        cache.snapshot().save(tmp_path / "held.safetensors")
        cache.restore("restored", holdover.Snapshot.load(tmp_path / "held.safetensors"))
        for stream in ("default", "twin", "restored"):
            with pytest.raises(ValueError, match=f"chunk 1 of stream '{stream}' was held, without a pass"):
                cache.hold(chunk=1, stream=stream)
            with pytest.raises(ValueError, match="was held, without a pass; number every chunk anew"):
                run(model, cache, 1, stream)
            run(model, cache, 2, stream)
        with pytest.raises(ValueError, match="hold within a step"), cache.step(chunk=3):
            cache.hold(chunk=4)
    with pytest.raises(ValueError, match="the cache is detached"):
        cache.hold(chunk=9)


@pytest.mark.filterwarnings("error")
def test_a_loop_that_needs_no_pass_is_not_told_that_nothing_can_be_reused() -> None:
    model = Stack(Scale())
    with holdover.attach(model, holdover.xcache(warmup=0)) as cache:
        for cycle in range(4):
            for index in range(2):
                with cache.step(chunk=4 * cycle, index=index, num_steps=2):
                    model(ones())
            for position in (1, 2, 3):
                cache.hold(chunk=4 * cycle + position, num_steps=2)
    assert cache.stats().held_chunks == 12

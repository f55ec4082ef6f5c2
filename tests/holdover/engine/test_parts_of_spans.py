"""A part of a span: some tokens are computed given what is remembered of the others, the others are held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import holdover
from holdover.method import Call, Policy, Trigger, Verdict
from holdover.methods.parts.predictors import Residual
from holdover.methods.parts.spans import ProbeAndTail
from tests.holdover.engine.models import FailOnce
from tests.holdover.engine.window import BLOCKS, DIM, FRAMES, PER_FRAME, NaiveFrontier, Window, tokens_of

STEPS = 2


@dataclass(frozen=True, kw_only=True)
class OneFrame(Trigger):
    """Computes the frame whose turn it is."""

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        return Verdict(None, {"recomputed": 1 / FRAMES}, part=tokens_of(call.step.chunk % FRAMES))


FRONTIER = Policy(
    name="frontier", spans=ProbeAndTail(0), trigger=OneFrame(), predictor=Residual(), per_index=True, parts=("block",)
)


def window(chunk: int, index: int, stream: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(1000 * stream + 10 * chunk + index)
    return torch.randn(1, FRAMES * PER_FRAME, DIM, generator=source)


def play(model: Window, cache: holdover.Cache, chunks: range, stream: int = 0, name: str = "default") -> list[Tensor]:
    outputs = []
    for chunk in chunks:
        for index in range(STEPS):
            with cache.step(chunk=chunk, index=index, num_steps=STEPS, commits=False, stream=name):
                outputs.append(model(window(chunk, index, stream)))
    return outputs


def naive(chunks: range, stream: int = 0) -> list[Tensor]:
    frontier = NaiveFrontier(Window())
    return [
        frontier(window(chunk, index, stream), index, chunk % FRAMES if chunk else None)
        for chunk in chunks
        for index in range(STEPS)
    ]


def test_the_tokens_asked_for_are_computed_and_the_others_held() -> None:
    model = Window()
    with holdover.attach(model, FRONTIER) as cache:
        outputs = play(model, cache, range(6))
        memory = 2 * BLOCKS * FRAMES * PER_FRAME * DIM  # keys and values
        assert cache.nbytes == STEPS * 4 * (memory + FRAMES * PER_FRAME * DIM)
    assert all(map(torch.equal, outputs, naive(range(6))))
    whole, part = FRAMES * PER_FRAME, PER_FRAME
    assert model.blocks[1].seen == [whole] * STEPS + [part] * 5 * STEPS
    assert [d.scores.get("recomputed") for d in cache.trace][STEPS * BLOCKS :] == [1 / FRAMES] * 5 * STEPS * BLOCKS
    assert not cache.exact()


def test_a_snapshot_in_mid_frontier_continues(tmp_path: Path) -> None:
    expected, model = naive(range(6)), Window()
    with holdover.attach(model, FRONTIER) as cache:
        play(model, cache, range(3))
        cache.snapshot().save(tmp_path / "snapshot")
    fresh = Window()
    with holdover.attach(fresh, FRONTIER) as cache:
        cache.restore("default", holdover.Snapshot.load(tmp_path / "snapshot"))
        assert all(map(torch.equal, play(fresh, cache, range(3, 6)), expected[3 * STEPS :]))


def test_a_snapshot_can_be_restored_again() -> None:
    """What was written into since then is the stream's, not the snapshot's."""
    expected, model = naive(range(6)), Window()
    with holdover.attach(model, FRONTIER) as cache:
        play(model, cache, range(3))
        snapshot = cache.snapshot()
        for stream in (7, 8):
            play(model, cache, range(3, 6), stream=stream)
            cache.restore("default", snapshot)
        assert all(map(torch.equal, play(model, cache, range(3, 6)), expected[3 * STEPS :]))


def test_a_fork_and_its_original_go_their_own_ways() -> None:
    expected, model = naive(range(6)), Window()
    with holdover.attach(model, FRONTIER) as cache:
        play(model, cache, range(3))
        cache.fork("default", "fork")
        play(model, cache, range(3, 6), stream=7, name="fork")
        assert all(map(torch.equal, play(model, cache, range(3, 6)), expected[3 * STEPS :]))


def test_after_a_failed_part_the_span_is_computed_whole() -> None:
    """The part has written into the memory by then."""
    model = Window()
    with holdover.attach(model, FRONTIER) as cache:
        play(model, cache, range(3))
        before = cache.nbytes
        model.register_forward_hook(FailOnce())
        with pytest.raises(RuntimeError), cache.step(chunk=3, num_steps=STEPS, commits=False):
            model(window(99, 0))
        assert cache.nbytes < before
        first, _ = play(model, cache, range(3, 4))
        assert cache.nbytes == before
    assert torch.equal(first, Window()(window(3, 0)))
    assert [d.reason for d in cache.trace][-STEPS * BLOCKS :] == ["interrupted"] * BLOCKS + ["reuse"] * BLOCKS


def test_a_part_writes_into_the_memory_unless_a_fork_has_it_too() -> None:
    model = Window()
    with holdover.attach(model, FRONTIER) as cache:

        def held(stream: str) -> list[int]:
            entries = cache._runtimes[0].streams[stream].entries.values()
            return [tensor.data_ptr() for entry in entries for own in entry.memory.values() for tensor in own.values()]

        play(model, cache, range(2))
        at_first = held("default")
        play(model, cache, range(2, 3))
        assert held("default") == at_first
        cache.fork("default", "fork")
        play(model, cache, range(3, 4), name="fork")
        forked = held("fork")
        assert not {*forked} & {*at_first}
        play(model, cache, range(4, 5), name="fork")
        assert held("fork") == forked
        assert held("default") == at_first


def test_rows_that_stand_elsewhere_compute_other_parts() -> None:
    """Two streams in one batch, a chunk apart: one computes another frame than the other, or everything."""
    model, expected = Window(), [naive(range(5)), naive(range(4), stream=1)]
    outputs: list[list[Tensor]] = [[], []]
    with holdover.attach(model, FRONTIER) as cache:
        outputs[0] += play(model, cache, range(1), name="0")
        for chunk in range(1, 5):
            for index in range(STEPS):
                steps = [
                    holdover.Step(chunk=chunk - n, index=index, num_steps=STEPS, commits=False, stream=str(n))
                    for n in (0, 1)
                ]
                with cache.step(rows=steps):
                    x = torch.cat([window(chunk - n, index, n) for n in (0, 1)])
                    for n, row in enumerate(model(x).split(1)):
                        outputs[n].append(row)
    for own, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6)


def test_an_audit_of_a_part_tells_its_error() -> None:
    model = Window()
    with holdover.attach(model, FRONTIER, audit=holdover.Audit(1.0, limit=1e9)) as cache:
        outputs = play(model, cache, range(3))
    plain = Window()
    assert all(map(torch.equal, outputs, naive(range(3))))
    last = [d for d in cache.trace if "audit" in d.scores]
    assert [d.block for d in last] == [BLOCKS - 1] * 2 * STEPS
    truth = plain(window(2, 1))
    assert last[-1].scores["audit"] == pytest.approx(float((outputs[-1] - truth).norm() / truth.norm()), rel=1e-4)


def test_a_model_that_cannot_compute_parts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'blocks\.0' does not say how; give holdover\.Slot\('blocks\.0', part="):
        holdover.attach(Window(parts=False), FRONTIER)


def test_kv_updates_are_computed_in_full() -> None:
    model = Window()
    with holdover.attach(model, FRONTIER) as cache:
        play(model, cache, range(2))
        with cache.step(chunk=1, role="kv_update"):
            assert torch.equal(model(window(9, 9)), Window()(window(9, 9)))

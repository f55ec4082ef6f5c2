"""Counting decisions, and telling them."""

from __future__ import annotations

import json
import weakref

import pytest
import torch

import holdover
from holdover.step import Role
from tests.holdover.engine.models import EAGER, Scale, Stack, ones


def test_records_tell_every_decision() -> None:
    model = Stack(Scale(), Scale())
    policy = holdover.xcache(warmup=0)
    with holdover.attach(model, policy) as cache:
        for chunk in range(2):
            with cache.step(chunk=chunk, index=1, num_steps=4, sigma=0.5, branch="cond", commits=False, action=[1.0]):
                model(ones())
                assert len(cache.trace) == 2 * chunk  # a pass is told when it has ended well
    records = json.loads(json.dumps(cache.trace.to_records()))
    assert records[0] == {
        "stream": "default",
        "branch": "cond",
        "chunk": 0,
        "index": 1,
        "slot": "blocks.0",
        "block": 0,
        "role": "denoise",
        "computed": True,
        "reason": "anchor",
        "scores": {},
        "sigma": 0.5,
    }
    assert (records[3]["computed"], records[3]["reason"]) == (False, "reuse")
    assert records[3]["scores"] == pytest.approx({"cosine": 1.0, "threshold": 0.98, "deviation": 0.0})
    assert [decision.block for decision in cache.trace[1:3]] == [1, 0]
    cache.trace.clear()
    assert len(cache.trace) == 0
    assert cache.stats().reused == 1  # counts are kept apart


@pytest.mark.parametrize("role", ["denoise", "kv_update"])
def test_a_trace_does_not_keep_what_steered_the_video(role: Role) -> None:
    model = Stack(Scale())
    with holdover.attach(model, holdover.xcache()) as cache:
        for chunk in range(2):
            prompt = torch.ones(3)
            given = weakref.ref(prompt)
            with cache.step(chunk=chunk, condition={"prompt": prompt}, role=role):
                model(ones())
            del prompt
            assert given() is None
        assert len(cache.trace) == 2


def test_stats_count_per_stream_and_over_all() -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, holdover.xcache()) as cache:
        for stream, chunks in (("a", 5), ("b", 2)):
            for chunk in range(chunks):
                with cache.step(stream=stream, chunk=chunk, commits=chunk == 2):
                    model(ones())
            with cache.step(stream=stream, chunk=chunks, role="kv_update"):
                model(ones())
        a, both = cache.stats("a"), cache.stats()
        # After warm-up, a ran 8 block calls: 4 anchors and protected pairs, of which 3 second blocks were reused.
        assert a.reasons == {"warm-up": 2, "anchor": 3, "reuse": 3, "kv cycle": 2, "kv update": 2}
        assert (a.computed, a.reused, a.skip) == (9, 3, 3 / 8)
        assert (both.computed, both.reused, both.skip) == (9 + 5, 4, 4 / 10)
        assert both.bytes_held == cache.nbytes == 2 * a.bytes_held
        assert cache.stats("nobody") == holdover.Stats(
            computed=0, reused=0, skip=0.0, bytes_held=0, reasons={}, audit=None
        )
    assert cache.nbytes == 0
    assert cache.stats() == both  # they outlive the attachment
    assert str(both).splitlines()[:2] == ["skipped    40.0% of the block calls after warm-up", "reused    4"]
    assert "reasons   " in str(both)
    assert "kv update 4" in str(both)


def test_reprs_say_what_they_are() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        assert repr(cache).startswith("<Cache of Policy(name='xcache'")
        assert "1 blocks" in repr(cache)
        assert repr(cache.trace) == "<Trace of 0 decisions>"
    assert repr(cache).endswith("detached>")

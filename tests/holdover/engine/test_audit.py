"""The audit computes a sample of reused spans as well, and changes nothing but what it reports."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import holdover
from tests.holdover.engine.models import EAGER, Scale, Stack, ones


def play(model: nn.Module, cache: holdover.Cache, chunks: range, stream: str = "default") -> list[torch.Tensor]:
    outputs = []
    for chunk in chunks:
        with cache.step(chunk=chunk, commits=False, stream=stream):
            outputs.append(model(ones(1 + 0.01 * chunk)))
    return outputs


def audited(cache: holdover.Cache) -> list[tuple[int, int]]:
    return [(d.chunk, d.block) for d in cache.trace if "audit" in d.scores]


@pytest.mark.parametrize("policy", [EAGER, holdover.fixed_interval(every=100, span="all", front_anchors=0, warmup=0)])
def test_the_error_is_that_of_the_span_and_the_output_stays(policy: holdover.Policy) -> None:
    model = Stack(Scale(2), Scale(3))
    with holdover.attach(model, policy) as cache:
        expected = play(model, cache, range(4))
    with holdover.attach(model, policy, audit=1.0) as cache:
        outputs = play(model, cache, range(4))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    errors = [d.scores["audit"] for d in cache.trace if "audit" in d.scores]
    if policy is EAGER:  # block 0 adds 1 where it should add x, block 1 adds 4 where it should add 2y
        x = 1.03
        y = x + 1
        assert errors[-2:] == pytest.approx([(2 * x - y) / (2 * x), (3 * y - (y + 4)) / (3 * y)], rel=1e-5)
        assert len(errors) == 6
    else:  # one span, from x to 6x
        assert errors == pytest.approx([(6 * x - (x + 5)) / (6 * x) for x in (1.01, 1.02, 1.03)], rel=1e-4)
    audit = cache.stats().audit
    assert audit is not None
    assert (audit.samples, audit.max_error, audit.alarmed) == (len(errors), max(errors), False)
    assert audit.mean_error == pytest.approx(sum(errors) / len(errors))


def test_the_sample_is_seeded_and_of_its_rate() -> None:
    drawn = []
    for seed in (0, 0, 1):
        model = Stack(Scale(), Scale())
        with holdover.attach(model, EAGER, audit=holdover.Audit(0.25, limit=10.0, seed=seed)) as cache:
            play(model, cache, range(201))
        drawn.append(audited(cache))
    assert drawn[0] == drawn[1] != drawn[2]
    assert 70 < len(drawn[0]) < 130
    assert holdover.attach(model, EAGER).stats().audit is None


def test_a_restored_stream_draws_on() -> None:
    model = Stack(Scale(), Scale())
    audit = holdover.Audit(0.5, limit=10.0)
    with holdover.attach(model, EAGER, audit=audit) as cache:
        play(model, cache, range(10))
        snapshot = cache.snapshot()
        play(model, cache, range(10, 30))
        whole = [at for at in audited(cache) if at[0] >= 10]
    with holdover.attach(model, EAGER, audit=audit) as cache:
        cache.restore("default", snapshot)
        play(model, cache, range(10, 30))
    assert audited(cache) == whole != []


def test_past_the_limit_it_warns_once_and_computes_the_stream_until_reset() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER, audit=holdover.Audit(1.0, limit=0.012)) as cache:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outputs = play(model, cache, range(6))
            play(model, cache, range(6), "other")
        assert len(caught) == 1
        assert "stream 'default' was off by 0.0146, past the audit's limit of 0.012" in str(caught[0].message)
        # Errors are x-1 over 2x: .005, .0098, then .0146 at chunk 3, which is still the reused output.
        assert [d.reason for d in cache.trace if d.stream == "default"] == ["first"] + ["reuse"] * 3 + ["audit"] * 2
        assert outputs[3][0, 0, 0] == pytest.approx(2.03)
        assert outputs[4][0, 0, 0] == pytest.approx(2.08)
        assert cache.stats("other").reasons == cache.stats("default").reasons
        audit = cache.stats().audit
        assert audit is not None
        assert audit.alarmed
        cache.reset("default")
        play(model, cache, range(6, 8))
        assert [d.reason for d in cache.trace][-2:] == ["first", "reuse"]


def test_an_audit_of_nonsense_alarms() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER, audit=1.0) as cache:
        play(model, cache, range(1))
        cache._runtimes[0].streams["default"].entries.popitem()[1].tensors["residual"].fill_(float("nan"))
        play(model, cache, range(1, 2))
        model.blocks[0].factor.fill_(float("nan"))
        with pytest.warns(UserWarning, match="off by inf"):
            play(model, cache, range(2, 3))


def test_it_is_refused_where_a_block_writes_in_place() -> None:
    model = Stack(Scale())
    with pytest.raises(ValueError, match=r"audit=0.5 would run block 'blocks.0' twice"):
        holdover.attach(model, EAGER, slots=[holdover.Slot("blocks.0", writes_kv=True)], audit=0.5)
    holdover.attach(model, EAGER, slots=[holdover.Slot("blocks.0", writes_kv=True)]).detach()


def test_a_block_that_overwrites_its_input_does_not_spoil_the_audited_output() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    model = Stack(InPlace())
    with holdover.attach(model, EAGER, audit=holdover.Audit(1.0, limit=10.0)) as cache:
        for chunk, value in enumerate((1, 5)):
            x = ones(value)
            with cache.step(chunk=chunk, commits=False):
                output = model(x)
    assert output[0, 0, 0] == 6
    assert x[0, 0, 0] == 5

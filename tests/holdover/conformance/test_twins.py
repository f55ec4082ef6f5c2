"""A closed gate changes no bit, detach leaves no trace, and decisions and outputs are the naive twins'."""

from __future__ import annotations

import pytest
import torch

import holdover
from tests.holdover.conformance.runs import closed, each, kv_tensors, play, same
from tests.holdover.registry import CLOSED, DEFAULTS, VARIED, Case
from tests.holdover.toy import ToyModel, cached, plain


@closed
@pytest.mark.parametrize("case", CLOSED, ids=lambda case: case.id)
def test_a_gate_that_never_opens_changes_no_bit(case: Case, model: ToyModel) -> None:
    bare, attached = case.loop(), case.loop()
    expected = play(model, bare, plain, case.length)
    with holdover.attach(model, case.policy()) as cache:
        outputs = play(model, attached, cached(cache), case.length)
    assert same(outputs, expected)
    assert same(kv_tensors(attached), kv_tensors(bare))
    assert cache.stats().reused == 0
    if "xcache" in case.name:
        assert cache.stats().reasons["cosine"] > 100  # the gate was asked, and said no


@each
def test_detach_restores_the_model(case: Case, model: ToyModel) -> None:
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    expected = play(model, case.loop(), plain, 6)
    cache = holdover.attach(model, case.policy())
    play(model, case.loop(), cached(cache), 2)
    with pytest.raises(RuntimeError), cache.step(chunk=2):
        model(torch.zeros(1, 7, 6), sigma=0.0, action=torch.zeros(1, 2))
    cache.detach()
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes
    assert same(play(model, case.loop(), plain, 6), expected)


@closed
@pytest.mark.parametrize("case", DEFAULTS + CLOSED + VARIED, ids=lambda case: case.id)
def test_decisions_and_outputs_are_the_twins(case: Case, model: ToyModel) -> None:
    twin, loop, twin_loop = case.naive(), case.loop(), case.loop()
    with holdover.attach(model, case.policy()) as cache:
        outputs = play(model, loop, cached(cache), case.length)
    expected = play(model, twin_loop, twin.runner, case.length)
    assert [(d.block, d.computed, d.reason) for d in cache.trace] == [
        (d["block"], d["computed"], d["reason"]) for d in twin.decisions
    ]
    for decision, naive in zip(cache.trace, twin.decisions, strict=True):
        assert decision.scores == pytest.approx(naive["scores"], rel=1e-4, abs=1e-5)
    for ours, theirs in ((outputs, expected), (kv_tensors(loop), kv_tensors(twin_loop))):
        assert len(ours) == len(theirs)
        torch.testing.assert_close(ours, theirs, rtol=case.tolerance, atol=case.tolerance)
    if case.name != "never" and case not in CLOSED:
        assert cache.stats().reused > 20

"""Two policies at two levels: the whole model outside, its blocks inside."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import holdover
from holdover.method import Call, Policy
from holdover.methods.parts.predictors import Repeat
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.triggers import Open
from tests.holdover.engine.models import FailOnce, Scale, Stack, ones
from tests.holdover.toy import BLOCKS, ToyLoop, ToyModel, cached, drive, one_thread


@dataclass(frozen=True)
class NotHeld:
    """Computes every pass of a chunk but these."""

    hold: tuple[int, ...]

    def __call__(self, call: Call) -> str | None:
        return None if call.step.index in self.hold else "computed"


def hold(*indices: int) -> Policy:
    """Repeats the model's output of the pass before at these passes."""
    return Policy(
        name="hold",
        spans=ProbeAndTail(0),
        trigger=Open(guard=NotHeld(indices)),
        predictor=Repeat(),
        lifetime="chunk",
        level="model",
    )


def play(model: ToyModel, cache: holdover.Cache, loop: ToyLoop, chunks: int) -> list[Tensor]:
    return [loop.step(model, action, cached(cache)) for action in drive(chunks, loop.chunk)]


class TwoCaches:
    """The same by hand: an inner cache that is not asked at the passes that are held."""

    def __init__(self, inner: holdover.Cache, held: tuple[int, ...]) -> None:
        self.inner, self.held = inner, held
        self.output: dict[str, Tensor] = {}

    def __call__(self, fields: dict[str, Any], run: Any) -> Tensor:
        if fields.get("role") != "kv_update" and fields["index"] in self.held:
            return self.output[fields["branch"]].clone()
        output = cached(self.inner)(fields, run)
        if fields.get("role") != "kv_update":
            self.output[fields["branch"]] = output.clone()
        return output


def test_an_outer_policy_holds_the_model_and_an_inner_one_its_blocks() -> None:
    with one_thread():
        model, loop = ToyModel(), ToyLoop()
        with holdover.attach(model, holdover.xcache()) as inner:
            by_hand = TwoCaches(inner, (1, 2))
            expected = [loop.step(model, action, by_hand) for action in drive(12)]
        model, loop = ToyModel(), ToyLoop()
        with holdover.attach(model, [hold(1, 2), holdover.xcache()]) as cache:
            outputs = play(model, cache, loop, 12)
    assert all(map(torch.equal, outputs, expected))
    told = [(d.chunk, d.index, d.block, d.reason, d.scores) for d in cache.trace if d.slot and d.reason != "hold"]
    assert told == [(d.chunk, d.index, d.block, d.reason, d.scores) for d in inner.trace]
    held = [d for d in cache.trace if d.slot and d.reason == "hold"]
    assert {d.index for d in held} == {1, 2}
    assert len(held) == 12 * 2 * BLOCKS
    whole = [d for d in cache.trace if not d.slot]
    assert [d.reason for d in whole if d.role == "denoise"] == ["computed", "reuse", "reuse", "computed"] * 12
    assert all(d.computed for d in cache.trace if d.role == "kv_update")
    stats = cache.stats()  # of the blocks
    assert stats.reused == len(held) + inner.stats().reused
    assert stats.computed == inner.stats().computed


def test_a_chunk_is_exact_if_it_is_so_at_every_level() -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, [hold(1), holdover.never()]) as cache:
        for index, exact in ((0, True), (1, False)):
            with cache.step(chunk=0, index=index, num_steps=2):
                model(ones())
            assert cache.exact() is exact
        with cache.step(chunk=1, num_steps=2):
            model(ones())
        assert cache.exact()


def test_snapshot_fork_reset_and_bytes_take_both_levels() -> None:
    policies = [hold(1, 2), replace(holdover.xcache(), look_ahead=1)]
    with one_thread():
        model, loop = ToyModel(), ToyLoop()
        with holdover.attach(model, policies) as cache:
            play(model, cache, loop, 5)
            snapshot, noise = cache.snapshot(), loop.noise
            assert snapshot.policies == tuple(map(repr, policies))
            assert cache.nbytes == cache.stats().bytes_held == snapshot.nbytes > 0
            cache.fork("default", "fork")
            assert cache.nbytes == 2 * snapshot.nbytes
            state = loop.chunk, list(loop.emitted), loop.committed, loop.committed_action, dict(loop.kv[""])
            expected = play(model, cache, loop, 3)
            cache.restore("default", snapshot)
            loop.chunk, loop.emitted, loop.committed, loop.committed_action, loop.kv[""] = state
            loop.noise = noise
            assert all(map(torch.equal, play(model, cache, loop, 3), expected))
            cache.reset()
            assert cache.nbytes == 0
        with (
            holdover.attach(model, holdover.xcache()) as other,
            pytest.raises(ValueError, match="attach with the snapshot's policy"),
        ):
            other.restore("default", snapshot)


def test_a_failed_pass_is_rolled_back_at_both_levels() -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, [hold(1), holdover.xcache(front_anchors=0, warmup=0)]) as cache:
        with cache.step(chunk=0, num_steps=2, commits=False):
            model(ones())
        before = len(cache.trace), cache.stats()
        model.register_forward_hook(fail_once := FailOnce())
        with pytest.raises(RuntimeError), cache.step(chunk=0, index=1, num_steps=2, commits=False):
            model(ones())
        assert fail_once.failed
        assert (len(cache.trace), cache.stats()) == before
        with cache.step(chunk=0, index=1, num_steps=2, commits=False):
            assert torch.equal(model(ones(7)), ones(4))  # the output of pass 0


@pytest.mark.parametrize(
    "policies",
    [[], [holdover.xcache(), hold(1)], [holdover.xcache(), holdover.never()]],
    ids=["none", "inner first", "one level"],
)
def test_levels_are_one_policy_each_outermost_first(policies: list[Policy]) -> None:
    with pytest.raises(ValueError, match="give one per level, outermost first: model, block, sublayer"):
        holdover.attach(ToyModel(), policies)


def test_detach_restores_model_and_blocks() -> None:
    model = ToyModel()
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    holdover.attach(model, [hold(1), holdover.xcache()]).detach()
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes

"""TeaCache on Wan beside its released code.

The records are of ali-vilab/TeaCache, commit 7c10efc4702c6b619f47805f7abe4a7a08085aa0: ``teacache_forward`` of
``TeaCache4Wan2.1/teacache_generate.py`` with the settings of two models, and of one with retained steps. The embedding
of the timestep, or its projection, what enters the blocks and what leaves them were prescribed, for two guidance
branches in turn.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
from torch import Tensor

import holdover
from tests.holdover.models.models import TINY, Tiny
from tests.holdover.released.replay import BRANCHES, Given, assert_replayed, record


class Tapped(Given):
    """A block that declares a tap."""

    tapped: Tensor

    def tap(self, x: Tensor) -> Tensor:
        return self.tapped

    def holdover_slots(self) -> list[holdover.Slot]:
        taps = {"time embedding": Tapped.tap, "time projection": Tapped.tap}
        return [holdover.Slot(self, taps=taps)]


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("teacache_wan", "wan-t2v-1.3b"),
        ("teacache_wan_14b", "wan-t2v-14b"),
        ("teacache_wan_retained", "wan-t2v-14b-retained"),
    ],
)
def test_the_preset_is_the_released_code(name: str, preset: str) -> None:
    recorded, model, outputs = record(name), Tapped(), []
    steps = len(recorded["signal"])
    with holdover.attach(model, holdover.policy("teacache", preset=preset)) as cache:
        for number, (x, y) in enumerate(zip(recorded["input"], recorded["output"], strict=True)):
            index, branch = divmod(number, 2)
            model.given, model.tapped = y, recorded["signal"][index]
            with cache.step(chunk=0, index=index, num_steps=steps, branch=BRANCHES[branch]):
                outputs.append(model(x))
    assert_replayed(cache, 0, outputs, recorded)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("teacache_wan", "wan-t2v-1.3b"),
        ("teacache_wan_14b", "wan-t2v-14b"),
        ("teacache_wan_retained", "wan-t2v-14b-retained"),
    ],
)
def test_the_preset_decides_alike_on_the_class_of_diffusers(name: str, preset: str) -> None:
    """Its own blocks, and the recorded embedding of the timestep in place of the embedder's."""
    pytest.importorskip("diffusers", reason="needs the extra: pip install 'holdover[diffusers]'")
    tiny = TINY[0]
    model = Tiny(tiny.name, {**tiny.config, "attention_head_dim": 4}, tiny.inputs).make()
    recorded, embedder = record(name), cast(Any, model.condition_embedder)
    steps = len(recorded["signal"])
    with holdover.attach(model, holdover.policy("teacache", preset=preset)) as cache:
        for index, signal in enumerate(recorded["signal"]):
            replaced = embedder.time_embedder if signal.dim() == 2 else embedder.time_proj
            replaced.forward = lambda x, signal=signal: signal.flatten(1)
            for branch in BRANCHES:
                with cache.step(chunk=0, index=index, num_steps=steps, branch=branch):
                    tiny.run(model, 0)
    computed = [decision.computed for decision in cache.trace if decision.block == 0]
    assert computed == recorded["computed"].bool().tolist()


def test_a_polynomial_that_was_fitted_to_another_tap_is_refused() -> None:
    message = "of='modulated', but the polynomial of preset 'wan-t2v-14b' was fitted to 'time embedding'"
    with pytest.raises(ValueError, match=message):
        holdover.policy("teacache", preset="wan-t2v-14b", of="modulated")
    fitted = holdover.methods.registry.presets("teacache")["wan-t2v-14b"]["polynomial"]
    with pytest.raises(ValueError, match=message):
        holdover.policy("teacache", polynomial=list(fitted))
    assert holdover.policy("teacache", preset="wan-t2v-14b", of="modulated", polynomial=(1.0, 0.0))


def test_a_model_without_the_tap_says_so() -> None:
    model = Given()
    model.given = record("teacache_wan")["output"][0]
    with (
        holdover.attach(model, holdover.policy("teacache", preset="wan-t2v-14b")) as cache,
        cache.step(chunk=0, num_steps=9),
        pytest.raises(ValueError, match="the policy reads 'time embedding', which block '' does not declare"),
    ):
        model(model.given)

"""Whole pipelines of Wan beyond text to video: from an image, and with two transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import holdover
import holdover.diffusers
from tests.holdover.models import pipelines

pytest.importorskip("diffusers", reason="needs the extra: pip install 'holdover[diffusers]'")
pytest.importorskip("transformers", reason="needs the extra: pip install 'holdover[diffusers]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention.*"),
    pytest.mark.filterwarnings("ignore:.* could reuse nothing"),
]
MAKERS = [pipelines.wan_22, pipelines.wan_animated, pipelines.wan_22_animated, pipelines.wan_22_small]
each = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
STEPS = 8


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {}


@pytest.fixture
def pipe(make: Callable[[], Any], pipes: dict[str, Any]) -> Any:
    if make.__name__ not in pipes:
        pipes[make.__name__] = make()
    return pipes[make.__name__]


def run(pipe: Any, *, seed: int = 0, picture: int = 0, **more: Any) -> Tensor:
    if "Image" in type(pipe).__name__:  # given words it would ask for the package ftfy
        texts = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(9))
        more |= {"image": pipelines.picture(picture), "prompt": None}
        more |= {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    return pipelines.video(pipe, seed=seed, num_frames=9, guidance_scale=3.0, steps=STEPS, **more)


def transformers(pipe: Any) -> list[Any]:
    return [part for name, part in sorted(pipe.components.items()) if name.startswith("transformer") and part]


def policy(threshold: float) -> holdover.Policy:
    return holdover.policy("fbcache", threshold=threshold)


@each
def test_a_gate_that_never_opens_changes_no_bit(pipe: Any) -> None:
    expected = run(pipe)
    enabled = holdover.diffusers.enable(pipe, policy(0.0))
    outputs = [run(pipe) for _ in range(2)]
    enabled.disable()
    assert all(torch.equal(output, expected) for output in outputs)
    assert len(enabled.caches) == len(transformers(pipe))
    high = int((pipe.scheduler.timesteps >= 1000 * (pipe.config.boundary_ratio or 0)).sum())
    assert 0 < high < STEPS or len(enabled.caches) == 1
    indices = [range(high), range(high, STEPS)][: len(enabled.caches)]
    for cache, mine in zip(enabled.caches.values(), indices, strict=True):
        steps = [(d.chunk, d.index, d.branch) for d in cache.trace if d.block == 0]
        assert steps == [(chunk, i, branch) for chunk in range(2) for i in mine for branch in ("cond", "uncond")]


@each
def test_fbcache_is_that_of_diffusers(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    for model in transformers(pipe):
        model.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    theirs = [run(pipe, seed=seed) for seed in (0, 1)]
    for model in transformers(pipe):
        model.disable_cache()
    enabled = holdover.diffusers.enable(pipe, policy(0.3))
    ours = [run(pipe, seed=seed) for seed in (0, 1)]
    enabled.disable()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert all(cache.stats().reused > 0 for cache in enabled.caches.values())


def test_of_two_transformers_neither_holds_anything_after_its_part() -> None:
    """Neither sees the last pass of a chunk, or the first."""
    pipe = pipelines.wan_22()
    enabled = holdover.diffusers.enable(pipe, policy(0.3))
    first, second = enabled.caches.values()
    held = []
    pipe.transformer_2.register_forward_hook(lambda *_: held.append((first.nbytes, second.nbytes)))
    run(pipe)
    assert {of_first for of_first, _ in held} == {0}
    assert max(of_second for _, of_second in held) > 0
    assert first.nbytes == second.nbytes == 0
    enabled.disable()


@each
def test_sessions_do_not_mix(pipe: Any) -> None:
    alone = {}
    for name, seed in (("a", 3), ("b", 4)):
        enabled = holdover.diffusers.enable(pipe, holdover.xcache())
        with enabled.stream(name):
            alone[name] = [run(pipe, seed=seed, picture=seed) for _ in range(2)]
        enabled.disable()
    enabled = holdover.diffusers.enable(pipe, holdover.xcache())
    for call in range(2):
        for name, seed in (("a", 3), ("b", 4)):
            with enabled.stream(name):
                assert torch.equal(run(pipe, seed=seed, picture=seed), alone[name][call])
    enabled.disable()
    assert all(cache.stats("a").reused > 0 for cache in enabled.caches.values())


def test_another_image_is_another_condition() -> None:
    pipe = pipelines.wan_animated()
    expected = run(pipe, picture=1)
    enabled = holdover.diffusers.enable(pipe, holdover.xcache(tau_floor=-1.0, margin=2.0, tau_dev=1e9))
    with enabled.stream("one"):
        run(pipe)
        assert torch.equal(run(pipe, picture=1), expected)
    assert enabled.cache.stats().reused == 0


def test_a_pipeline_is_enabled_as_a_whole_or_not_at_all() -> None:
    pipe = pipelines.wan_22()
    enabled = holdover.diffusers.enable(pipe.transformer_2, policy(0.0))
    with pytest.raises(ValueError, match="transformer_2 is enabled already"):
        holdover.diffusers.enable(pipe, policy(0.0))
    enabled.disable()
    pipe.transformer_2.blocks[1] = torch.nn.Identity()
    with pytest.raises(ValueError, match="takes no argument 'hidden_states'"):
        holdover.diffusers.enable(pipe, policy(0.0))
    pipe.transformer_2 = pipelines.wan_22().transformer_2
    holdover.diffusers.enable(pipe, policy(0.0)).disable()

"""`holdover.diffusers.enable`: whole pipelines run unmodified, and every step of their scheduler is a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
import holdover.diffusers
from tests.holdover.models import pipelines
from tests.holdover.models.inputs import COLUMNS, ROWS
from tests.holdover.models.models import TINY

pytest.importorskip("diffusers", reason="needs the extra: pip install 'holdover[diffusers]'")
pytest.importorskip("transformers", reason="needs the extra: pip install 'holdover[diffusers]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention.*"),
    pytest.mark.filterwarnings("ignore:.* could reuse nothing"),
]
GUIDED = {"num_frames": 9, "guidance_scale": 3.0}
CHUNKS = {"num_frames": 9, "chunk_partition": [1, 1, 1], "steps": 4}


@pytest.fixture(scope="module")
def wan() -> Any:
    return pipelines.wan()


@pytest.fixture(scope="module")
def far() -> Any:
    return pipelines.far()


def fbcache(threshold: float) -> holdover.Policy:
    return holdover.policy("fbcache", threshold=threshold)


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


def test_a_pipeline_runs_unmodified_and_says_where_it_is(wan: Any) -> None:
    expected = pipelines.video(wan, **GUIDED)
    before = attributes(wan.transformer)
    enabled = holdover.diffusers.enable(wan, fbcache(0.0))
    outputs = [pipelines.video(wan, **GUIDED) for _ in range(2)]
    holdover.diffusers.disable(wan)
    assert all(torch.equal(output, expected) for output in outputs)
    assert attributes(wan.transformer) == before
    steps = [(d.chunk, d.index, d.branch) for d in enabled.cache.trace if d.block == 0]
    assert steps == [(chunk, i, branch) for chunk in range(2) for i in range(6) for branch in ("cond", "uncond")]
    wan.scheduler.set_timesteps(6)
    sigmas = [d.sigma for d in enabled.cache.trace if d.block == 0 and d.branch == "cond"][:6]
    assert sigmas == pytest.approx(wan.scheduler.sigmas[:6].tolist())


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.15, 0.4, 10.0])
def test_fbcache_is_that_of_diffusers(wan: Any, threshold: float) -> None:
    from diffusers import FirstBlockCacheConfig

    wan.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    theirs = pipelines.video(wan, steps=12, **GUIDED)
    wan.transformer.disable_cache()
    enabled = holdover.diffusers.enable(wan, fbcache(threshold))
    ours = pipelines.video(wan, steps=12, **GUIDED)
    enabled.disable()
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (enabled.cache.stats().reused > 0) == (threshold > 0.05)


@pytest.mark.parametrize("order", [1, 2])
def test_taylorseer_is_that_of_diffusers(wan: Any, order: int) -> None:
    from diffusers import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=2,  # they compute steps 0, 1, 3, 6, 9
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+"],
    )
    wan.transformer.enable_cache(config)
    theirs = pipelines.video(wan, steps=12, **GUIDED)
    wan.transformer.disable_cache()
    policy = holdover.policy("taylorseer", every=3, order=order, span="block", retain=2)
    enabled = holdover.diffusers.enable(wan, policy)
    ours = pipelines.video(wan, steps=12, **GUIDED)
    enabled.disable()
    assert enabled.cache.stats().reused == 2 * 3 * 7
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_from_one_chunk_to_the_next_the_same_video_costs_its_anchors(wan: Any) -> None:
    enabled = holdover.diffusers.enable(wan, holdover.xcache())
    with enabled.stream("one"):
        first = pipelines.video(wan, **GUIDED)
        assert torch.allclose(pipelines.video(wan, **GUIDED), first, atol=1e-4)
        assert enabled.cache.stats().reused == 2 * 6 * 2  # branches, steps, blocks but the front anchor
        pipelines.video(wan, prompt="a car", **GUIDED)
    enabled.disable()
    assert enabled.cache.stats().reasons["condition"] == 6 * 2  # of the branch whose prompt changed
    assert enabled.cache.stats().reused == 2 * 6 * 2 + 6 * 2


def test_sessions_do_not_mix(wan: Any) -> None:
    policy = fbcache(0.3)
    seeds = {"a": 3, "b": 4}
    alone = {}
    for name, seed in seeds.items():
        enabled = holdover.diffusers.enable(wan, policy)
        alone[name] = [pipelines.video(wan, seed=seed, **GUIDED) for _ in range(2)]
        enabled.disable()
    enabled = holdover.diffusers.enable(wan, policy)
    for call in range(2):
        for name, seed in seeds.items():
            with enabled.stream(name):
                assert torch.equal(pipelines.video(wan, seed=seed, **GUIDED), alone[name][call])
    enabled.disable()
    assert {d.stream for d in enabled.cache.trace} == {"a", "b"}


def test_every_pass_that_writes_the_kv_cache_is_computed(far: Any) -> None:
    """AnyFlow FAR: three chunks, of which two are committed to the KV cache by a clean pass."""
    expected = pipelines.video(far, **CHUNKS)
    enabled = holdover.diffusers.enable(far, holdover.xcache())
    assert torch.equal(pipelines.video(far, **CHUNKS), expected)  # it commits every chunk: nothing may be skipped
    assert enabled.cache.stats().reused == 0
    enabled.disable()
    policy = holdover.fixed_interval(over="steps", every=4, front_anchors=0, warmup=0, protection="pass")
    enabled = holdover.diffusers.enable(far, policy)
    pipelines.video(far, **CHUNKS)
    enabled.disable()
    writes = [d for d in enabled.cache.trace if d.role == "kv_update"]
    assert [(d.chunk, d.block) for d in writes] == [(chunk, block) for chunk in range(2) for block in range(3)]
    assert all(d.computed for d in writes)
    assert enabled.cache.stats().reused == 3 * 3 * 3


def test_every_pass_that_captures_keys_and_values_is_computed() -> None:
    """SANA-WM's refiner: a sink frame is captured, then two chunks of three steps, each captured once refined."""
    pipe = pipelines.refiner()
    video = torch.randn(1, 4, 7, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))

    def refined() -> Tensor:
        latents: Tensor = pipe(video, "a car", fps=8.0, output_type="latent")
        return latents

    expected = refined()
    enabled = holdover.diffusers.enable(pipe, holdover.xcache())
    assert torch.equal(refined(), expected)  # it commits every chunk: nothing may be skipped
    enabled.disable()
    policy = holdover.fixed_interval(over="steps", every=3, front_anchors=0, warmup=0, protection="pass")
    enabled = holdover.diffusers.enable(pipe, policy)
    refined()
    enabled.disable()
    steps = [(d.chunk, d.index, d.role, d.computed) for d in enabled.cache.trace if d.block == 0]
    chunks = [[(n, i, "denoise", i == 0) for i in range(3)] + [(n, 0, "kv_update", True)] for n in range(2)]
    assert steps == [(0, 0, "kv_update", True), *chunks[0], *chunks[1]]


def test_guidance_batched_and_a_scheduler_that_counts_no_steps() -> None:
    pipe = pipelines.cogvideox()
    expected = pipelines.video(pipe, num_frames=9, guidance_scale=2.0, turned=True)
    enabled = holdover.diffusers.enable(pipe, fbcache(0.0))
    assert torch.equal(pipelines.video(pipe, num_frames=9, guidance_scale=2.0, turned=True), expected)
    steps = [(d.branch, d.index) for d in enabled.cache.trace if d.block == 0]
    assert steps == [("cond_uncond", index) for index in range(6)]


def test_another_attention_backend(wan: Any) -> None:
    wan.transformer.set_attention_backend("_native_math")
    expected = pipelines.video(wan, **GUIDED)
    enabled = holdover.diffusers.enable(wan, fbcache(0.0))
    assert torch.equal(pipelines.video(wan, **GUIDED), expected)
    enabled.disable()
    wan.transformer.reset_attention_backend()


def test_what_cannot_be_enabled_is_explained(wan: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    enabled = holdover.diffusers.enable(wan, fbcache(0.1))
    with pytest.raises(ValueError, match="enabled already"):
        holdover.diffusers.enable(wan.transformer, fbcache(0.1))
    enabled.disable()
    wan.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="diffusers' own cache is on"):
        holdover.diffusers.enable(wan, fbcache(0.1))
    wan.transformer.disable_cache()
    with pytest.raises(ValueError, match="none of the known models"):
        holdover.diffusers.enable(nn.Linear(2, 2), fbcache(0.1))
    holdover.diffusers.disable(wan)


class TestByItself:
    """A transformer without its pipeline."""

    tiny = TINY[0]

    def run(self, model: nn.Module, step: int, text: float = 1.0) -> Tensor:
        inputs = self.tiny.inputs(step, 3, 1, 0)
        inputs["encoder_hidden_states"] = text * inputs["encoder_hidden_states"]
        output: Tensor = model(**inputs, return_dict=False)[0]
        return output

    def test_needs_to_be_told_the_step(self) -> None:
        model: Any = self.tiny.make()
        enabled = holdover.diffusers.enable(model, fbcache(10.0))
        with pytest.raises(ValueError, match="where this pass of transformer stands is not known"):
            self.run(model, 0)
        for index in range(2):
            with enabled.cache.step(chunk=0, index=index, num_steps=2, commits=False):
                output = self.run(model, 0)
        assert [d.reason for d in enabled.cache.trace] == ["probe", "first", "first", "probe", "reuse", "reuse"]
        for chunk in (0, 1):  # steps that begin again are a new chunk
            for index in range(2):
                with model.cache_context("cond", step_index=index, num_inference_steps=2):
                    assert torch.allclose(self.run(model, 0), output, atol=1e-6)
            assert [d.chunk for d in enabled.cache.trace][-6:] == [chunk] * 6

    def test_a_pass_that_fails_leaves_nothing(self) -> None:
        model: Any = self.tiny.make()
        enabled = holdover.diffusers.enable(model, fbcache(10.0))
        with pytest.raises(TypeError), model.cache_context("cond", step_index=0, num_inference_steps=2):
            model(torch.zeros(1, 4, 3, 8, 12), torch.zeros(1))
        with model.cache_context("cond", step_index=0, num_inference_steps=2):
            self.run(model, 0)
        assert [d.reason for d in enabled.cache.trace] == ["probe", "first", "first"]

    def test_unnamed_guidance_branches_differ_in_their_condition(self) -> None:
        model: Any = self.tiny.make()
        pipe = SimpleNamespace(
            components={"transformer": model},
            transformer=model,
            scheduler=SimpleNamespace(timesteps=torch.tensor([900.0, 850.0])),
            progress_bar=iter,
        )
        enabled = holdover.diffusers.enable(pipe, fbcache(10.0))
        for index in range(2):
            for text in (1.0, -1.0):
                self.run(model, index, text)
        steps = [(d.branch, d.index) for d in enabled.cache.trace if d.block == 0]
        assert steps == [("", 0), ("1", 0), ("", 1), ("1", 1)]
        with pytest.raises(ValueError, match="ran twice at step 1 under one condition"):
            self.run(model, 1, -1.0)

    @pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
    def test_compiled(self, whole: bool) -> None:
        model: Any = self.tiny.make()
        expected = [self.run(model, 0), self.run(model, 1)]
        (model.compile if whole else model.compile_repeated_blocks)(backend="eager")
        for threshold in (0.0, 10.0):
            enabled = holdover.diffusers.enable(model, fbcache(threshold))
            outputs = []
            for index in range(2):
                with model.cache_context("cond", step_index=index, num_inference_steps=2):
                    outputs.append(self.run(model, index))
            enabled.disable()
            assert torch.allclose(outputs[0], expected[0], atol=1e-5)
            assert torch.allclose(outputs[1], expected[1], atol=1e-5) == (threshold == 0)
            assert enabled.cache.stats().reused == (2 if threshold else 0)
        torch.compiler.reset()

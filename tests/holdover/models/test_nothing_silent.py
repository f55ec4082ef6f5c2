"""Pipelines and adapters: what goes wrong is undone, refused or said at once."""

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
enable = holdover.diffusers.enable


def run(pipe: Any, **more: Any) -> Tensor:
    return pipelines.video(pipe, **{"num_frames": 9, "guidance_scale": 3.0, **more})


def fbcache(threshold: float = 0.3) -> holdover.Policy:
    return holdover.policy("fbcache", threshold=threshold)


def steps(cache: holdover.Cache, branch: str = "cond") -> list[tuple[int, int]]:
    return [(d.chunk, d.index) for d in cache.trace if d.block == 0 and d.branch == branch]


# Where a pass stands.


@pytest.mark.parametrize("policy", [fbcache(), holdover.policy("taylorseer", every=3)], ids=lambda policy: policy.name)
def test_two_pipelines_share_a_transformer_each_with_a_scheduler(policy: holdover.Policy) -> None:
    import diffusers

    def schedule() -> Any:
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )

    alone = pipelines.wan()
    alone.scheduler = schedule()
    with_cache = enable(alone, policy)
    expected = run(alone)
    with_cache.disable()
    first = pipelines.wan()
    second = diffusers.WanPipeline(**{**first.components, "scheduler": schedule()})
    second.set_progress_bar_config(disable=True)
    enabled = enable(first, policy)
    for _ in range(2):
        run(first, steps=10)
        assert torch.equal(run(second), expected)
    lengths = (10, 6, 10, 6)
    assert steps(enabled.cache) == [(chunk, index) for chunk, steps in enumerate(lengths) for index in range(steps)]
    enabled.disable()


def test_denoising_begins_part_way() -> None:
    """Video to video: first steps that are retained are the first that run."""
    import diffusers

    pipe = pipelines.wan(diffusers.WanVideoToVideoPipeline, vae=pipelines.wan_22_small().vae)
    enabled = enable(
        pipe, holdover.fixed_interval(over="steps", every=50, front_anchors=0, warmup=0, protection="pass")
    )
    again = {"strength": 0.6, "prompt": None, **texts(), "guidance_scale": 3.0}
    pipelines.video(pipe, steps=10, **again)
    assert steps(enabled.cache, "") == [(0, index) for index in range(4, 10)]  # it names no branches
    enabled.disable()
    enabled = enable(pipe, holdover.policy("magcache", ratios=[1.0] * 10, threshold=9.0, max_skips=9, retain=2))
    pipelines.video(pipe, steps=10, **again)
    assert retained(enabled.cache, "") == [4, 5]
    assert enabled.cache.nbytes == 0
    enabled.disable()


def test_first_steps_are_retained_in_a_second_transformer_too() -> None:
    pipe = pipelines.wan_22()
    enabled = enable(pipe, holdover.policy("magcache", ratios=[1.0] * 8, threshold=9.0, max_skips=9, retain=1))
    run(pipe, steps=8)
    first, second = (retained(cache) for cache in enabled.caches.values())
    assert first == [0]
    assert second == [steps(list(enabled.caches.values())[1])[0][1]]
    enabled.disable()


def texts() -> dict[str, Tensor]:
    """Embedded prompts: given words, some pipelines would ask for the package ftfy."""
    both = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(9))
    return {"prompt_embeds": both[0], "negative_prompt_embeds": both[1]}


def retained(cache: holdover.Cache, branch: str = "cond") -> list[int]:
    return [d.index for d in cache.trace if d.block == 0 and d.branch == branch and d.reason == "retained"]


@pytest.fixture(scope="module")
def skyreels() -> Callable[..., Tensor]:
    import diffusers

    pipe = pipelines.wan(
        diffusers.SkyReelsV2DiffusionForcingPipeline,
        vae=pipelines.wan_22_small().vae,
        transformer=pipelines.transformer("SkyReelsV2Transformer3DModel", num_frame_per_block=1),
    )

    def call(**more: Any) -> Tensor:
        sizes = {"num_frames": 9, "base_num_frames": 9, "ar_step": 0, "height": 64, "width": 96, **more}
        frames: Tensor = pipe(
            prompt=None,
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="latent",
            return_dict=False,
            generator=torch.Generator().manual_seed(0),
            **texts(),
            **sizes,
        )[0]
        return frames

    call.pipe = pipe  # type: ignore[attr-defined]
    return call


def test_one_schedule_serves_several_chunks(skyreels: Any) -> None:
    """SkyReels-V2: every frame has a copy of the scheduler; a long video is made of three chunks."""
    long = {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5}
    expected = skyreels(**long)
    enabled = enable(skyreels.pipe, fbcache(0.0))
    assert torch.equal(skyreels(**long), expected)
    assert steps(enabled.cache) == [(chunk, index) for chunk in range(3) for index in range(4)]
    enabled.disable()


def test_frames_at_several_steps_are_refused(skyreels: Any) -> None:
    enabled = enable(skyreels.pipe, fbcache())
    with pytest.raises(
        ValueError, match=r"ar_step=2: frames of a pass would stand at several steps.*ar_step=0.*disable"
    ):
        skyreels(ar_step=2, causal_block_size=1)
    assert enabled.cache.stats().computed == 0  # before the first pass
    skyreels()
    enabled.disable()


def test_a_loop_with_a_scheduler_of_its_own_is_told_that_its_place_is_unknown() -> None:
    """Neither the pipeline's schedule nor the timestep tells it."""
    pipe = pipelines.wan()
    enabled = enable(pipe, fbcache())
    run(pipe)
    inputs = {"hidden_states": pipelines.start(), "encoder_hidden_states": texts()["prompt_embeds"]}
    with pytest.raises(ValueError, match=r"where this pass of transformer stands is not known.*step_index"):
        pipe.transformer(timestep=torch.tensor([123.0]), **inputs)
    for timestep in pipe.scheduler.timesteps:  # of the pipeline's schedule, though this loop never steps it
        pipe.transformer(timestep=timestep[None], **inputs)
    assert steps(enabled.cache, "")[-6:] == [(1, index) for index in range(6)]
    enabled.disable()


@pytest.mark.parametrize("prompts", ["alike", "different"])
def test_equal_prompts_where_branches_have_no_names(prompts: str) -> None:
    pipe = pipelines.far()
    calls = {"prompt": "a car turns left", "negative_prompt": "a car turns left" if prompts == "alike" else "a"}
    chunks = {"num_frames": 9, "chunk_partition": [1, 1, 1], "steps": 4, "guidance_scale": 3.0}
    expected = pipelines.video(pipe, **chunks, **calls)
    enabled = enable(pipe, fbcache(0.0))
    assert torch.equal(pipelines.video(pipe, **chunks, **calls), expected)
    enabled.disable()


# A pass that fails.


@pytest.fixture(scope="module")
def fresh() -> Tensor:
    pipe = pipelines.wan()
    with_cache = enable(pipe, fbcache())
    output = run(pipe)
    with_cache.disable()
    return output


AFTER: dict[str, Callable[[Any, Any], Any]] = {
    "reset": lambda pipe, enabled: enabled.cache.reset(),
    "snapshot": lambda pipe, enabled: enabled.cache.snapshot(),
    "lora": lambda pipe, enabled: pipe.transformer.disable_lora(),
    "nothing": lambda pipe, enabled: None,
    "enable": lambda pipe, enabled: (enabled.disable(), enable(pipe, fbcache())),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("after", AFTER)
def test_a_pass_that_was_interrupted_leaves_nothing(error: type[BaseException], after: str, fresh: Tensor) -> None:
    pipe, calls = pipelines.wan(), []
    enabled = enable(pipe, fbcache())

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error

    handle = pipe.transformer.blocks[1].attn1.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        run(pipe)
    handle.remove()
    assert not enabled.cache.in_step
    if after == "lora" and not pytest.importorskip("peft"):
        return
    AFTER[after](pipe, enabled)
    for _ in range(2):
        assert torch.equal(run(pipe), fresh)
    holdover.diffusers.disable(pipe)


def test_a_forward_that_failed_may_be_tried_again(fresh: Tensor) -> None:
    pipe, failed = pipelines.wan(), []

    class Retrying(type(pipe.transformer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().__call__(*args, **kwargs)
            except torch.OutOfMemoryError:
                return super().__call__(*args, **kwargs)

    def fail(*_: Any) -> None:
        if len(failed) < 3 and enabled.cache.in_step:
            failed.append(1)
            if len(failed) != 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

    enabled = enable(pipe, fbcache())
    pipe.transformer.blocks[1].attn1.register_forward_pre_hook(fail)
    pipe.transformer.__class__ = Retrying
    assert torch.equal(run(pipe), fresh)
    assert len(failed) == 3
    assert len(set(steps(enabled.cache))) == len(steps(enabled.cache)) == 6

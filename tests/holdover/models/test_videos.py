"""What one video holds is its own, goes when it ends, and never reaches another one or a copy."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import holdover
import holdover.diffusers
from holdover.engine import condition as conditions
from holdover.engine.runtime import TALLIES
from holdover.models.registry import find
from tests.holdover.models import pipelines
from tests.holdover.models.models import TINY, Tiny

pytest.importorskip("diffusers", reason="needs the extra: pip install 'holdover[diffusers]'")
pytest.importorskip("transformers", reason="needs the extra: pip install 'holdover[diffusers]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention.*"),
    pytest.mark.filterwarnings("ignore:.* could reuse nothing"),
]
enable = holdover.diffusers.enable
#: Policies that live as long as a stream.
LASTING = [holdover.xcache(), holdover.fixed_interval()]
lasting = pytest.mark.parametrize("policy", LASTING, ids=lambda policy: policy.name)


def run(pipe: Any, **more: Any) -> Tensor:
    return pipelines.video(pipe, **{"num_frames": 9, "guidance_scale": 3.0, **more})


def fbcache(threshold: float = 0.3) -> holdover.Policy:
    return holdover.policy("fbcache", threshold=threshold)


# Lifetimes.


def test_nothing_is_held_once_the_video_is_made() -> None:
    """While the VAE decodes, too. Guidance may end before the last step."""
    pipe = pipelines.wan()
    for policy in (fbcache(), holdover.policy("taylorseer", every=3), holdover.policy("dicache", threshold=0.3)):
        for until in (6, 3):
            enabled, most = enable(pipe, policy), [0]
            pipe.transformer.register_forward_hook(lambda *_, e=enabled, m=most: m.append(e.cache.nbytes))

            def end(pipe: Any, index: int, t: Any, given: Any, until: int = until) -> dict[str, Any]:
                if index + 1 == until:
                    pipe._guidance_scale = 1.0
                return {}

            run(pipe, callback_on_step_end=end)
            assert max(most) > 0
            assert enabled.cache.nbytes == 0
            enabled.disable()


def test_streams_that_were_reset_do_not_pile_up() -> None:
    model: Any = TINY[0].make()
    enabled = enable(model, fbcache())
    for request in range(TALLIES + 20):
        with enabled.stream(f"request {request}"), model.cache_context("cond", step_index=0, num_inference_steps=1):
            if request < 3 or request > TALLIES:
                TINY[0].run(model, 0)
            else:  # as if it had run
                enabled.cache._runtimes[0].tallies[f"request {request}"].computed += 3
        enabled.cache.reset(f"request {request}")
    assert len(enabled._videos._known) <= 2
    assert len(enabled.cache._runtimes[0].tallies) <= TALLIES + 1
    assert enabled.cache.stats().computed == 3 * (TALLIES + 20)
    assert enabled.cache.stats("request 0").computed == 0
    assert enabled.cache.stats(f"request {TALLIES + 19}").computed == 3


# One video's content in another.


@lasting
def test_a_call_is_a_video_of_its_own(policy: holdover.Policy) -> None:
    pipe = pipelines.wan()
    expected = [run(pipe, seed=seed) for seed in (0, 1)]
    enabled = enable(pipe, policy)
    run(pipe)
    with pytest.warns(UserWarning, match=r"every call of a pipeline is a video of its own.*enabled\.stream\('name'\)"):
        assert torch.equal(run(pipe, seed=1), expected[1])
    assert torch.equal(run(pipe), expected[0])
    assert enabled.cache.stats().reused == 0
    with enabled.stream("drive"), warnings.catch_warnings(action="error"):
        for _ in range(3):
            run(pipe)
    assert enabled.cache.stats().reused > 0
    enabled.disable()


@lasting
@pytest.mark.parametrize("goes_on", [False, True])
def test_another_image_is_another_video(policy: holdover.Policy, goes_on: bool) -> None:
    """The image comes as channels beside the noise, or as a frame without noise."""
    for make in (pipelines.wan_22_animated, pipelines.wan_22_small):
        pipe, name = make(), "drive" if goes_on else "default"
        text = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(9))
        words = {"prompt": None, "prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
        images = [pipelines.picture(seed)[None] for seed in (0, 1)]
        expected = run(pipe, image=images[1], **words)
        enabled = enable(pipe, policy)
        with enabled.stream(name), warnings.catch_warnings(action="ignore"):
            run(pipe, image=images[0], **words)
            assert torch.equal(run(pipe, image=images[1], **words), expected)
        enabled.disable()


#: What steers no video: the noise, where it stands, sizes and places, what was generated before, and how to return.
STEERS_NOTHING = {
    *("hidden_states", "timestep", "r_timestep", "timestep_r", "sigma", "audio_timestep", "audio_sigma", "return_dict"),
    *("audio_hidden_states", "attention_kwargs", "num_frames", "height", "width", "audio_num_frames", "video_coords"),
    *("audio_coords", "rope_interpolation_scale", "image_rotary_emb", "video_rotary_emb", "motion_encode_batch_size"),
    *("indices_hidden_states", "indices_latents", "latents_clean", "indices_latents_clean", "latents_history_2x"),
    *("indices_latents_history_2x", "latents_history_4x", "indices_latents_history_4x", "latents_history_short"),
    *("latents_history_mid", "latents_history_long", "indices_latents_history_short", "indices_latents_history_mid"),
    *("indices_latents_history_long", "clean_hidden_states", "clean_timestep", "chunk_partition", "kv_cache"),
    *("kv_cache_flag", "kv_cache_mode", "enable_diffusion_forcing", "timestep_cond", "chunk_size", "data_info"),
    *("cam_pos_embeds", "pos_embeds", "frame_valid_mask", "use_cross_timestep", "isolate_modalities"),
    *("spatio_temporal_guidance_blocks", "perturbation_mask", "text_indexes", "position_ids", "und_len"),
    *("sequence_length", "action_noisy_frame_indexes", "action_timesteps"),
}
#: Made of the noisy latents anew in every pass.
ANEW = {"block_controlnet_hidden_states", "controlnet_block_samples"}
each = pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.name)


def is_layout(name: str) -> bool:
    """Cosmos 3 packs its tokens in one sequence; these say how, or are noisy."""
    return name.startswith(("vision_", "sound_")) or name.endswith(("_indexes", "_shapes"))


@each
def test_every_input_that_steers_a_video_is_in_its_condition(tiny: Tiny) -> None:
    model = tiny.make()
    adapter = find(model)
    assert adapter is not None
    given = tiny.inputs(0, 3, 1, 0)
    before = conditions.freeze(adapter.steering(model, given))
    steering = {
        name
        for name in inspect.signature(type(model).forward).parameters
        if name not in STEERS_NOTHING | ANEW | {"self"} and not is_layout(name)
    }
    if "FAR" in tiny.name:
        steering.remove("attention_mask")  # it says which chunks see which
    assert "encoder_hidden_states" in steering or "input_ids" in steering
    for name in steering:
        value = given.get(name)
        other: Any = torch.ones(1) if value is None else value + 1 if not isinstance(value, Tensor) else changed(value)
        if name == "action_tokens":
            other = [torch.ones(1)]
        assert not conditions.same(before, adapter.steering(model, {**given, name: other})), name
    for name in STEERS_NOTHING & given.keys() - {"hidden_states", "timestep"}:
        if isinstance(given[name], Tensor):
            assert conditions.same(before, adapter.steering(model, {**given, name: changed(given[name])})), name


@each
def test_an_image_among_the_latents_is_in_the_condition(tiny: Tiny) -> None:
    model = tiny.make()
    adapter = find(model)
    assert adapter is not None
    given = tiny.inputs(0, 3, 1, 0)
    if adapter.given is None or "hidden_states" not in given:
        pytest.skip("its image, if it takes one, is an argument, or history")
    found = 0
    noisy = given["hidden_states"]
    axis = 2 if "CogVideoX" in tiny.name else 1
    if noisy.dim() == 5:
        wide = torch.cat([noisy, noisy[:1]], dim=axis)
        found += differs(adapter, model, given, wide, torch.cat([noisy, noisy[:1] + 1], dim=axis))
        assert not differs(adapter, model, given, noisy, noisy + 1) or "Animate" in tiny.name
    frames = noisy.shape[2] if noisy.dim() == 5 else noisy.shape[1]
    still = torch.full((1, frames), 900.0)
    still[:, 0] = 0
    other = noisy.clone()
    other[(slice(None), slice(None), 0) if noisy.dim() == 5 else (slice(None), 0)] += 1
    found += differs(adapter, model, {**given, "timestep": still}, noisy, other)
    assert found


def differs(adapter: Any, model: Any, given: dict[str, Any], first: Tensor, second: Tensor) -> bool:
    one, two = (conditions.freeze(adapter.steering(model, {**given, "hidden_states": x})) for x in (first, second))
    return not conditions.same(one, two)


def changed(value: Tensor) -> Tensor:
    return ~value if value.dtype == torch.bool else value + 1


# Two caches, and other modules.


def test_another_cache_is_refused() -> None:
    from diffusers import FirstBlockCacheConfig, apply_first_block_cache

    pipe, config = pipelines.wan(), FirstBlockCacheConfig(threshold=0.15)
    expected = run(pipe)
    enabled = enable(pipe, fbcache(0.0))
    with pytest.raises(ValueError, match=r"Holdover's cache is on in transformer.*disable\(\.\.\.\) first"):
        pipe.transformer.enable_cache(config)
    assert torch.equal(run(pipe), expected)
    apply_first_block_cache(pipe.transformer, config)
    with pytest.raises(ValueError, match=r"diffusers' own cache is on in transformer \(FBC.*\.disable_cache\(\) first"):
        run(pipe)
    enabled.disable()
    with pytest.raises(ValueError, match="diffusers' own cache is on"):
        enable(pipe, fbcache())


def test_another_transformer_is_noticed() -> None:
    pipe = pipelines.wan_22()
    enabled, first = enable(pipe, fbcache()), pipe.transformer_2
    pipe.transformer_2 = pipelines.transformer("WanTransformer3DModel")
    with pytest.raises(ValueError, match=r"transformer_2 of the pipeline is another one.*enabled\.disable\(\), then"):
        run(pipe)
    pipe.transformer_2 = first
    run(pipe)
    enabled.disable()
    assert not {"check_inputs", "progress_bar"} & vars(pipe).keys()


def test_a_pipeline_that_does_not_tell_when_a_call_begins_is_refused() -> None:
    class Own:
        def __init__(self) -> None:
            self.components = {"transformer": pipelines.transformer("WanTransformer3DModel")}
            self.transformer = self.components["transformer"]

    with pytest.raises(ValueError, match=r"Own has none of check_inputs, progress_bar.*enable\(pipe\.transformer"):
        enable(Own(), fbcache())
    enable(Own().transformer, fbcache()).disable()


RATIOS = {"cond": [1.0] * 6, "uncond": [1.0] * 6}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fastercache", {}),
        ("dicache", {"preset": "wan"}),
        ("worldcache_pcd", {"preset": "released-wan", "probe": 2}),
        ("magcache", {"ratios": RATIOS}),
    ],
)
def test_a_method_that_tells_guidance_apart_says_so_at_once(name: str, options: dict[str, Any]) -> None:
    for pipe, more in (
        (pipelines.cogvideox(), {"turned": True, "guidance_scale": 2.0}),
        (pipelines.far(), {"chunk_partition": [1, 1, 1]}),
    ):
        enabled = enable(pipe, holdover.policy(name, **options))
        with pytest.raises(ValueError, match=rf"{name} tells guidance branches apart.*'cond' and 'uncond'"):
            run(pipe, **more)
        assert enabled.cache.stats().computed == 0
        enabled.disable()
    pipe = pipelines.wan()
    enabled = enable(pipe, holdover.policy(name, **options))
    run(pipe)
    assert enabled.cache.stats().computed > 0
    enabled.disable()


# Copies.


def test_a_copy_of_an_enabled_transformer_is_plain() -> None:
    pipe = pipelines.wan()
    plain = set(vars(pipe.transformer))
    enabled = enable(pipe, fbcache(10.0))
    copies = [copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))]
    whole = copy.deepcopy(pipe)
    for twin in (*copies, whole.transformer):
        assert set(vars(twin)) == plain
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert not {"check_inputs", "set_adapters"} & vars(whole).keys()
    outputs = [run(pipelines.wan(transformer=twin)) for twin in copies]
    outputs.append(run(whole))
    enabled.disable()
    for parameter in pipe.transformer.parameters():
        parameter.zero_()
    assert all(torch.equal(output, run(pipe)) for output in outputs)

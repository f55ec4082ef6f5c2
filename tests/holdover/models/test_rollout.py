"""`holdover.enable` on pipelines of the Self-Forcing family: one line, and their own ``inference()`` as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import holdover
from tests.holdover.models.causal_wan import CHANNELS, CHUNK, COLUMNS, ROWS
from tests.holdover.models.contracts import contract
from tests.holdover.models.rollouts import FewSteps, Interactive, ManySteps, Pipeline
from tests.holdover.models.test_contracts import same, tensors

pytestmark = pytest.mark.filterwarnings("ignore:.* could reuse nothing")

CHUNKS = 4
PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "Self-Forcing": lambda: FewSteps(contract("Self-Forcing")),
    "Self-Forcing, noisy context": lambda: FewSteps(contract("Self-Forcing"), context_noise=100),
    "Self-Forcing, many steps": lambda: ManySteps(contract("Self-Forcing")),
    "Causal-Forcing": lambda: FewSteps(contract("Self-Forcing"), levels=(1000, 500), first=(1000, 750, 500, 250)),
    "LongLive": lambda: FewSteps(contract("LongLive")),
    "LongLive, branch v1.0": lambda: Interactive(contract("LongLive, branch v1.0")),
    "CausVid-like schedule": lambda: FewSteps(contract("Self-Forcing"), levels=(1000.0, 937.5, 833.3333)),
}
each = pytest.mark.parametrize("name", PIPELINES)
POLICIES: dict[str, Callable[[], holdover.Policy]] = {
    "fbcache": lambda: holdover.policy("fbcache", threshold=0.5),
    "taylorseer": lambda: holdover.policy("taylorseer", every=2),
    "fixed over steps": lambda: holdover.fixed_interval(over="steps", every=2, warmup=0, protection="pass"),
    "fixed over chunks": lambda: holdover.fixed_interval(every=3, front_anchors=0, protection="pass"),
    "xcache": lambda: holdover.xcache(protection="pass", front_anchors=0, tau_floor=-1.0, margin=2.0, tau_dev=1e9),
    "step_hold": lambda: holdover.policy("step_hold"),
}


def prompts(name: str) -> list[str]:
    return ["rain", "rain", "sun", "sun"] if "v1.0" in name else ["rain"] * CHUNKS


def noise(chunks: int = CHUNKS, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(1, chunks * CHUNK, CHANNELS, ROWS, COLUMNS, generator=source)


def written(pipeline: Any) -> list[Tensor]:
    """What the KV caches of a pipeline hold, as far as it is filled."""
    caches = [value for name, value in sorted(vars(pipeline).items()) if name.startswith("kv_cache")]
    return [
        tensor
        for held in (held for cache in caches for held in cache)
        for tensor in (
            held["k"][:, : int(held["local_end_index"])],
            held["v"][:, : int(held["local_end_index"])],
            *tensors([held["global_end_index"], held["local_end_index"]]),
        )
    ]


def steps(cache: holdover.Cache) -> list[tuple[Any, ...]]:
    first = [d for d in cache.trace if d.block == 0]
    return [(d.chunk, d.branch, d.role if d.role != "denoise" else d.index) for d in first]


@each
@torch.no_grad()
def test_where_a_pass_stands_follows_from_timestep_and_place(name: str) -> None:
    expected = PIPELINES[name]().inference(noise(), prompts(name))
    pipeline = PIPELINES[name]()
    attributes = {key: dict(module.__dict__) for key, module in pipeline.named_modules()}
    enabled = holdover.enable(pipeline, holdover.never())
    for _ in range(2):  # videos after each other
        pipeline.source.manual_seed(0)
        assert torch.equal(pipeline.inference(noise(), prompts(name)), expected)
    enabled.disable()
    found = {key: dict(module.__dict__) for key, module in pipeline.named_modules()}
    for values in (attributes[""], found[""]):  # the pipeline's own state
        for own in ("kv_cache1", "kv_cache_pos", "kv_cache_neg", "crossattn_cache"):
            values.pop(own, None)
    if "v1.0" not in name:
        assert found == attributes
    branches = ["cond", "uncond"] if "many" in name else [""]
    counts = [6 if "many" in name else 3 if "CausVid" in name else 4] * CHUNKS
    if "Causal-Forcing" in name:
        counts[1:] = [2] * (CHUNKS - 1)
    told: list[tuple[Any, ...]] = []
    for chunk in range(2 * CHUNKS):
        if "v1.0" in name and chunk % CHUNKS == 2:
            told.append((chunk - 1, "", "kv_update"))  # written anew for another prompt
        told += [(chunk, branch, index) for index in range(counts[chunk % CHUNKS]) for branch in branches]
        told += [(chunk, branch, "kv_update") for branch in branches]
    assert steps(enabled.cache) == told


@each
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_the_kv_cache_is_that_of_full_compute_for_the_same_clean_latents(name: str, policy: str) -> None:
    """Its oracle runs the passes alone that write."""
    pipeline, writes = PIPELINES[name](), list[tuple[Any, ...]]()
    enabled = holdover.enable(pipeline, POLICIES[policy]())

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if enabled.cache.open_steps[0].role == "kv_update":
            plain = {key: value for key, value in kwargs.items() if not key.endswith("_cache")}
            writes.append((args[0].clone(), plain, enabled.cache.open_steps[0].branch))

    pipeline.generator.model.register_forward_pre_hook(note, with_kwargs=True)
    pipeline.inference(noise(), prompts(name))
    assert enabled.cache.stats().reused > 0
    assert len(writes) == CHUNKS * (2 if "many" in name else 1) + ("v1.0" in name)
    oracle: Any = PIPELINES[name]()
    if isinstance(oracle, FewSteps):
        oracle.begin()
    held: Any = pipeline
    crossattn_caches: dict[str, Any] = {}
    for x, kwargs, branch in writes:
        ending = {"": "1", "cond": "_pos", "uncond": "_neg"}[branch]
        crossattn = crossattn_caches.setdefault(branch, oracle.crossattn())
        if kwargs.get("sink_recache_after_switch"):
            for each in crossattn:
                each["is_init"] = False
        oracle.generator.model(x, **kwargs, kv_cache=getattr(oracle, f"kv_cache{ending}"), crossattn_cache=crossattn)
        if kwargs.get("sink_recache_after_switch"):
            for each in crossattn:
                each["is_init"] = False
    assert same(written(held), written(oracle))


@torch.no_grad()
def test_a_held_pass_calls_no_network_and_the_sampler_is_given_its_clean_prediction() -> None:
    """The naive twin: in passes 1 and 2 the wrapper gives the clean latents of pass 0 again."""

    class Twin(FewSteps):
        def call(self, latents: Tensor, timestep: Tensor, prompt: str, start: int, **more: Any) -> Tensor:
            if float(timestep.max()) in (750.0, 500.0):
                return self.clean
            self.clean = super().call(latents, timestep, prompt, start, **more)
            return self.clean

    expected = Twin(contract("Self-Forcing")).inference(noise(), prompts(""))
    pipeline = FewSteps(contract("Self-Forcing"))
    calls: list[float] = []
    pipeline.generator.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    enabled = holdover.enable(pipeline, holdover.policy("step_hold"))
    torch.testing.assert_close(pipeline.inference(noise(), prompts("")), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3 * CHUNKS
    assert enabled.cache.nbytes == 0


@torch.no_grad()
def test_videos_of_two_names_interleaved_are_those_of_two_runs() -> None:
    def make() -> FewSteps:
        return FewSteps(contract("Self-Forcing"))

    def passes(pipeline: FewSteps, cache: Any, seed: int) -> Any:
        pipeline.begin()
        for chunk in range(CHUNKS):
            x = noise(1, seed + chunk)
            for level in (1000, 750, 500, 250, 0):
                with cache.stream(str(seed)):
                    x = pipeline.call(x, torch.full((1, CHUNK), level), "rain", chunk * CHUNK)
                yield x.clone()

    policy = POLICIES["fixed over chunks"]()
    alone = {}
    for seed in (0, 10):
        pipeline = make()
        alone[seed] = list(passes(pipeline, holdover.enable(pipeline, policy), seed))
    first, second = make(), make()
    second.generator = first.generator
    enabled = holdover.enable(first, policy)
    with pytest.raises(ValueError, match="enabled already"):
        holdover.enable(second, policy)
    for a, b, *expected in zip(passes(first, enabled, 0), passes(second, enabled, 10), *alone.values(), strict=True):
        assert same([a, b], expected)
    assert enabled.cache.stats().reused > 0


@torch.no_grad()
def test_a_video_begins_with_given_latents_or_after_an_interrupted_one() -> None:
    initial = noise(2, seed=5)
    plain, pipeline = FewSteps(contract("Self-Forcing")), FewSteps(contract("Self-Forcing"))
    expected = plain.inference(noise(2), ["rain"] * 2, initial_latent=initial)
    enabled = holdover.enable(pipeline, holdover.policy("fbcache", threshold=0.0))
    failing = pipeline.generator.model.blocks[1].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        pipeline.inference(noise(), prompts(""))
    failing.remove()
    assert not enabled.cache.in_step
    pipeline.source.manual_seed(0)
    assert torch.equal(pipeline.inference(noise(2), ["rain"] * 2, initial_latent=initial), expected)
    roles = [what for _, _, what in steps(enabled.cache)]
    assert roles == ["kv_update"] * 2 + [0, 1, 2, 3, "kv_update"] * 2
    enabled.disable()
    enabled.disable()


def test_what_is_no_such_pipeline_says_what_to_do() -> None:
    pipeline = FewSteps(contract("Self-Forcing"))
    with pytest.raises(ValueError, match=r"Generator is not the model itself.*'model'; attach to that: .*x\.model"):
        holdover.attach(pipeline.generator, holdover.xcache())
    with pytest.raises(ValueError, match="Linear is or holds none of the known models"):
        holdover.enable(torch.nn.Linear(2, 2), holdover.xcache())
    del pipeline.denoising_step_list
    with pytest.raises(
        ValueError, match=r"FewSteps has neither denoising_step_list nor sampling_steps.*generator\.model"
    ):
        holdover.enable(pipeline, holdover.xcache())
    with pytest.raises(ValueError, match="LongLive 2 cannot be reused"):
        holdover.enable(FewSteps(contract("LongLive 2")), holdover.xcache())
    rolling = FewSteps(contract("Rolling Forcing"))
    enabled = holdover.enable(rolling, holdover.never())
    rolling.begin()
    with pytest.raises(ValueError, match=r"over latent frames at several timesteps.*enabled\.cache\.step"):
        rolling.call(noise(2), torch.tensor([[500.0] * CHUNK + [1000.0] * CHUNK]), "rain", 0)
    enabled.disable()
    with pytest.raises(ValueError, match=r"pab works within blocks.*Slot\('blocks\.0\.attn1', kind='spatial'\)"):
        holdover.attach(contract("Self-Forcing").model(), holdover.policy("pab"))


def test_enable_forwards_pipelines_and_transformers_of_diffusers() -> None:
    pytest.importorskip("diffusers", reason="needs the extra: pip install 'holdover[diffusers]'")
    from tests.holdover.models.models import TINY

    model: Any = TINY[0].make()
    enabled = holdover.enable(model, holdover.policy("fbcache"))
    assert isinstance(enabled, holdover.diffusers.Enabled)
    enabled.disable()

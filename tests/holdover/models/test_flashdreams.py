"""FlashDreams' own classes, tiny, on a processor: its pipelines run as they are under `holdover.enable`."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import holdover
from tests.holdover.models import dreams
from tests.holdover.models.dreams import begin, chunks, written
from tests.holdover.models.test_docs import example

pytestmark = pytest.mark.filterwarnings("ignore:.* could reuse nothing")

CHUNKS = 5  # three of them fill the KV cache
#: TemplateDiT is one block, which is a method of its network.
TEMPLATE = {"slots": [holdover.Slot("", method="_self_attn_block", writes_kv=True)]}
RECIPES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "Wan, fresh noise": (dreams.wan, {}),
    "Wan, Euler": (lambda: dreams.wan("Euler"), {}),
    "Wan, UniPC": (lambda: dreams.wan("UniPC"), {}),
    "Wan, guided": (lambda: dreams.wan(guided=True), {}),
    "Wan, noisy context": (lambda: dreams.wan(context_noise=100), {}),
    "Wan 2.2": (dreams.wan22, {}),
    "Cosmos": (dreams.cosmos, {}),
    "Cosmos without a clean pass": (lambda: dreams.cosmos(skip_finalize_kv_cache=True), {}),
    "template": (dreams.template, TEMPLATE),
    "template, guided": (lambda: dreams.template(guidance_scale=2.0), TEMPLATE),
}
each = pytest.mark.parametrize("name", RECIPES)


def some(step: holdover.Step) -> float:
    """Two of three chunks are familiar."""
    return float(step.chunk % 3 > 0)


def named(**kinds: str) -> dict[str, Any]:
    """Layers of Wan's blocks, as slots."""
    layers = [(n, layer) for n in range(4) for layer in kinds]
    return {
        "slots": [
            holdover.Slot(f"blocks.{n}.{layer}", kind=kinds[layer], writes_kv=layer == "self_attn")  # type: ignore
            for n, layer in layers
        ]
    }


#: Every method, with options under which it reuses much in four passes where each chunk is committed; what it is told
#: beside; None where it is of no use here.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]] | None] = {
    "bwcache": ({"threshold": 9.0}, {}),
    "deepcache": ({}, {}),
    "delta_dit": ({}, {}),
    "dicache": ({"threshold": 9.0}, {}),
    "easycache": ({"threshold": 9.0, "retain": 1}, {}),
    "fastercache": None,  # guidance branches run within one call of the model
    "fbcache": ({"threshold": 9.0}, {}),
    "fixed_interval": ({"every": 2, "front_anchors": 0, "protection": "pass"}, {}),
    "flowcache": ({"threshold": 9.0}, {}),
    "frontier": None,  # it computes latent frames, of which the next chunk has none
    "light_interaction": ({"familiar": some}, {}),
    "magcache": ({"ratios": [1.0] * 4, "threshold": 9.0}, {}),
    "never": None,  # it reuses nothing
    "pab": ({"spatial": 2, "cross": 3, "start": 0.0, "stop": 1.0}, named(self_attn="spatial", cross_attn="cross")),
    "step_hold": ({}, {}),
    "taylorseer": ({}, {}),
    "teacache": ({"threshold": 9.0}, {}),
    "toca": ({}, named(self_attn="spatial", cross_attn="cross", ffn="mlp")),
    "worldcache_htc": None,  # it looks back on three outputs, and the fourth pass is the last
    "worldcache_pcd": ({"threshold": 9.0}, {}),
    "xcache": ({"protection": "pass", "front_anchors": 0, "tau_floor": -1.0, "margin": 2.0, "tau_dev": 1e9}, {}),
    "xcache_reactive": None,  # it decides by an action, which FlashDreams does not name
}
SUITING = [name for name, known in METHODS.items() if known is not None]


def enabled_with(pipeline: Any, method: str) -> Any:
    known = METHODS[method]
    assert known is not None
    policy = holdover.policy(method, **known[0])
    more = TEMPLATE if pipeline.encoder and policy.level == "block" else known[1]
    return holdover.enable(pipeline, policy, **more)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def reused(enabled: Any) -> int:
    return sum(cache.stats().reused for cache in enabled.caches.values())


def networks(pipeline: Any) -> list[nn.Module]:
    return [m for name, m in pipeline.named_modules() if name.rpartition(".")[2] == "network"]


def attributes(pipeline: Any) -> dict[str, Any]:
    found = {name: dict(module.__dict__) for name, module in pipeline.named_modules()}
    for own in found.values():
        for name in ("_rng", "_output_height", "_output_width", "_batch_size"):
            own.pop(name, None)
    return found


@each
@torch.no_grad()
def test_never_changes_no_bit_and_every_pass_is_told(name: str) -> None:
    make, options = RECIPES[name]
    expected = chunks(plain := make(), begin(plain), CHUNKS)
    pipeline = make()
    before = attributes(pipeline)
    enabled = holdover.enable(pipeline, holdover.never(), **options)
    rollout = begin(pipeline)
    assert same(chunks(pipeline, rollout, CHUNKS), expected)
    enabled.disable()
    enabled.disable()
    assert attributes(pipeline) == before
    assert enabled.stream(rollout) == "rollout 0"
    branches = ["cond", "uncond"] if "guided" in name else [""]
    passes = {key: [0, 1, 2, 3] for key in enabled.caches}
    if name == "Wan 2.2":  # above and below a timestep of 900, which its first two levels are
        assert list(passes) == ["transformer_high_noise.network", "transformer_low_noise.network"]
        passes = dict(zip(passes, ([0, 1], [2, 3]), strict=True))
    schedule = pipeline.diffusion_model.scheduler
    sigmas = (schedule.denoising_sigmas if hasattr(schedule, "denoising_sigmas") else schedule.sigmas).tolist()
    for key, indices in passes.items():
        if "without" in name:
            indices = indices[:-1]  # what the last pass writes is never written anew
        told = [
            row
            for chunk in range(CHUNKS)
            for row in (
                *((chunk, branch, index, sigmas[index]) for index in indices for branch in branches),
                *((chunk, branch, "kv_update", None) for branch in branches),
            )
        ]
        first = [d for d in enabled.caches[key].trace if d.block == 0]
        assert told == [(d.chunk, d.branch, d.role if d.role != "denoise" else d.index, d.sigma) for d in first]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("scheduler", dreams.SCHEDULERS)
@torch.no_grad()
def test_of_five_calls_two_are_held_and_the_sampler_is_given_their_clean_prediction(
    scheduler: str, guided: bool
) -> None:
    """The naive twin: in passes 1 and 2 the flow is that from the latents to what pass 0 predicted."""
    twin = dreams.wan(scheduler, guided)
    transformer, schedule = twin.diffusion_model.transformer, twin.diffusion_model.scheduler
    sigmas = schedule.denoising_sigmas if scheduler == "fresh noise" else schedule.sigmas
    original, ran, clean = transformer.predict_flow, [0], [torch.empty(0)]

    def predict_flow(noisy_latent: Tensor, timestep: Tensor, cache: Any, input: Any = None) -> Tensor:
        index = ran[0] % 5
        ran[0] += 1
        if index in (1, 2):
            return (noisy_latent - clean[0]) / sigmas[index]
        flow: Tensor = original(noisy_latent, timestep, cache, input)
        if index < 4:
            clean[0] = noisy_latent - sigmas[index] * flow
        return flow

    transformer.predict_flow = predict_flow
    rollout = begin(twin)
    expected, held = chunks(twin, rollout, CHUNKS), written(rollout)
    pipeline = dreams.wan(scheduler, guided)
    calls: list[nn.Module] = []
    for network in networks(pipeline):
        network.register_forward_pre_hook(lambda module, _: calls.append(module))
    enabled = holdover.enable(pipeline, holdover.policy("step_hold", hold=(1, 2)))
    rollout = begin(pipeline)
    torch.testing.assert_close(chunks(pipeline, rollout, CHUNKS), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(written(rollout), held, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3 * CHUNKS * (2 if guided else 1)
    assert enabled.cache.nbytes == 0
    first = [d for d in enabled.cache.trace if d.chunk == 0]
    assert [d.computed for d in first] == [True, False, False, True, True]


def test_every_method_is_looked_at() -> None:
    assert sorted(METHODS) == holdover.policies()


@pytest.mark.parametrize(
    ("name", "method"),
    [("Wan, guided", method) for method in SUITING]
    + [
        (name, method) for name in ("Wan 2.2", "template", "Cosmos") for method in ("step_hold", "taylorseer", "xcache")
    ],
)
@torch.no_grad()
def test_the_clean_pass_is_computed_exactly_in_full(name: str, method: str) -> None:
    """Its oracle runs the passes alone that write."""
    pipeline, oracle = RECIPES[name][0](), RECIPES[name][0]()
    enabled, clean = enabled_with(pipeline, method), list[Any]()
    model = pipeline.diffusion_model
    finalize = model.finalize

    def note(final_state: Any) -> None:
        clean.append(final_state.clean_latent.clone())
        finalize(final_state)

    model.finalize = note
    rollout = begin(pipeline)
    chunks(pipeline, rollout, CHUNKS)
    assert reused(enabled) > 0
    updates = [d for cache in enabled.caches.values() for d in cache.trace if d.role == "kv_update"]
    assert all(d.computed for d in updates)
    # Wan 2.2 finalizes both its networks without asking the model.
    assert {d.chunk for d in updates} == ({*range(CHUNKS)} if (name, method) != ("Wan 2.2", "step_hold") else set())
    transformer, other = oracle.diffusion_model.transformer, begin(oracle)
    for chunk, latent in enumerate(clean):
        control = dreams.control(oracle, chunk)
        if control is not None:
            control = transformer.patchify_and_maybe_split_cp(oracle.encoder(control))
        other.transformer_cache.start(chunk)
        transformer.finalize_kv_cache(latent, torch.tensor(0.0), other.transformer_cache, control)
        other.transformer_cache.finalize(chunk)
    assert same(written(rollout), written(other))


@pytest.mark.parametrize("method", ["step_hold", "xcache", "fixed_interval", "taylorseer"])
@pytest.mark.parametrize("name", ["Wan, guided", "Wan 2.2", "template"])
@torch.no_grad()
def test_two_rollouts_interleaved_are_those_of_two_runs(name: str, method: str) -> None:
    make = RECIPES[name][0]
    alone = {}
    for seed in (0, 1):
        pipeline = make()
        enabled_with(pipeline, method)
        rollout = begin(pipeline, seed)
        alone[seed] = chunks(pipeline, rollout, CHUNKS, seed), written(rollout)
    pipeline = make()
    enabled = enabled_with(pipeline, method)
    rollouts = [begin(pipeline, seed) for seed in (0, 1)]
    together = [chunks(pipeline, rollouts[0], 2), list[Tensor]()]
    for chunk in range(CHUNKS):
        for seed, first in ((0, chunk + 2), (1, chunk)):
            together[seed] += chunks(pipeline, rollouts[seed], first < CHUNKS, seed, first)
    for seed in (0, 1):
        assert same(together[seed], alone[seed][0])
        assert same(written(rollouts[seed]), alone[seed][1])
    assert reused(enabled) > 0
    assert {enabled.stream(rollout) for rollout in rollouts} == set(enabled.cache.streams)


@torch.no_grad()
def test_a_rollout_is_forgotten_once_its_cache_is_gone() -> None:
    pipeline = dreams.wan()
    enabled = enabled_with(pipeline, "fixed_interval")  # it holds blocks from chunk to chunk
    rollouts = [begin(pipeline, seed) for seed in range(3)]
    names = [enabled.stream(rollout) for rollout in rollouts]
    assert enabled.stream(rollouts[0].transformer_cache) == names[0]
    for rollout in rollouts:
        chunks(pipeline, rollout, 1)
    assert enabled.cache.streams == tuple(names)
    enabled.end(rollouts[2])
    enabled.end(rollouts[2])
    assert enabled.cache.streams == tuple(names[:2])
    last = rollouts[1]
    del rollout, rollouts[1:]

    def drop(*_: Any) -> None:
        rollouts.clear()
        gc.collect()

    handle = networks(pipeline)[0].register_forward_pre_hook(drop)  # the first ends within a pass of the second
    chunks(pipeline, last, 1, first=1)
    handle.remove()
    assert enabled.cache.streams == (names[1],)
    assert enabled.cache.nbytes > 0
    del last
    gc.collect()
    assert enabled.cache.nbytes == 0
    assert enabled.cache.streams == ()
    assert enabled.stream(begin(pipeline)) not in names


@pytest.mark.parametrize("method", ["step_hold", "taylorseer"])
@torch.no_grad()
def test_what_fails_is_rolled_back(method: str) -> None:
    class Stop(BaseException):
        pass

    def stop_at(index: int) -> Any:
        """In one of the passes that run from now on."""
        left = [index]

        def look(*_: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Stop

        return networks(pipeline)[0].blocks[2].self_attn.register_forward_pre_hook(look)  # type: ignore

    plain = dreams.wan()
    enabled_with(plain, method)
    expected = chunks(plain, begin(plain), CHUNKS)
    pipeline = dreams.wan()
    enabled = enabled_with(pipeline, method)
    rollout, other = begin(pipeline), begin(pipeline)
    made = chunks(pipeline, rollout, 1)
    handle = stop_at(0 if method == "taylorseer" else 1)
    with pytest.raises(Stop):
        pipeline.generate(1, rollout)
    handle.remove()
    assert not enabled.cache.in_step
    assert enabled.cache.nbytes == 0
    assert same(chunks(pipeline, other, 2), expected[:2])
    rollout.autoregressive_index = 0  # FlashDreams' own bookkeeping is left as the failure left it
    for block in rollout.transformer_cache.network_cache.block_caches:
        block.self_attn._curr_chunk_idx = None
    pipeline.diffusion_model.rng.manual_seed(1)
    made.append(pipeline.generate(1, rollout))
    handle = stop_at(0)
    with pytest.raises(Stop):
        pipeline.finalize(1, rollout)
    handle.remove()
    assert not enabled.cache.in_step
    pipeline.finalize(1, rollout)
    assert same(made + chunks(pipeline, rollout, CHUNKS - 2, first=2), expected)


class Graph:
    """A CUDA graph on a processor: it keeps every operation with its very tensors, and replays them without Python."""

    made: ClassVar[list[Graph]] = []

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, output in self.calls:
            again = function(*args, **kwargs)
            for kept, new in zip(*(tree_leaves(each) for each in (output, again)), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class Capture(TorchDispatchMode):
    def __init__(self, graph: Graph, capture_error_mode: str) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, output))
        return output


@pytest.mark.parametrize("method", ["step_hold", "light_interaction"])
@torch.no_grad()
def test_where_the_network_is_replayed_as_a_graph_the_whole_model_is_held(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dreams.wan()
    enabled_with(plain, method)
    expected = chunks(plain, begin(plain), CHUNKS + 1)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(Graph, "made", [])
    pipeline = dreams.wan(use_cuda_graph=True)
    for blockwise in ("fbcache", "xcache", "never"):
        with pytest.raises(ValueError, match=rf"{blockwise} would decide block by block.*use_cuda_graph=False.*step_h"):
            holdover.enable(pipeline, holdover.policy(blockwise))
    with pytest.raises(ValueError, match=r"taylorseer would decide block by block"):
        holdover.enable(pipeline, [holdover.policy("step_hold"), holdover.policy("taylorseer")])
    before = attributes(pipeline)
    enabled = enabled_with(pipeline, method)
    rollout = begin(pipeline)
    assert same(chunks(pipeline, rollout, CHUNKS + 1), expected)
    # Chunks 3, 4 and 5 run where the KV cache is full, two calls of them before there is a graph.
    [graph] = Graph.made
    assert graph.replays == sum(d.computed for d in enabled.cache.trace if d.chunk >= 3) - 2
    assert reused(enabled) > 0
    enabled.disable()
    assert attributes(pipeline).keys() == before.keys()


@torch.no_grad()
def test_policies_of_two_levels_work_together() -> None:
    pipeline, known = dreams.wan(guided=True), METHODS["xcache"]
    assert known is not None
    xcache = holdover.policy("xcache", **known[0])
    enabled = holdover.enable(pipeline, [holdover.policy("step_hold", hold=(1,)), xcache])
    rollout = begin(pipeline)
    chunks(pipeline, rollout, CHUNKS)
    model, network = enabled.caches["transformer"], enabled.caches["network"]
    assert enabled.cache is model
    assert [d.index for d in model.trace if d.chunk == 0 and d.reused] == [1]
    assert {d.index for d in network.trace if d.role == "denoise"} == {0, 2, 3}
    assert network.stats().reused > 0
    assert network._runtimes[0].view_groups == (holdover.ViewGroup("video", 1, dreams.ROWS // 2, dreams.COLUMNS // 2),)


@pytest.mark.parametrize("method", ["step_hold", "fixed_interval"])
@torch.no_grad()
def test_types_copies_and_another_video_in_the_same_cache(method: str) -> None:
    pipeline = dreams.wan(dtype=torch.bfloat16)
    enabled = enabled_with(pipeline, method)
    made = chunks(pipeline, rollout := begin(pipeline, dtype=torch.bfloat16), 1)
    assert made[0].dtype == torch.bfloat16
    plain = copy.deepcopy(pipeline)
    assert "_holdover" not in str({key for m in plain.modules() for key in m.__dict__})
    plain.diffusion_model.rng.manual_seed(0)
    with_all = plain.generate(0, begin(plain, dtype=torch.bfloat16))
    assert torch.equal(with_all, made[0]) == (method == "fixed_interval")  # which computes the first chunk
    with pytest.raises(ValueError, match="enabled already"):
        holdover.enable(pipeline.diffusion_model, holdover.policy("step_hold"))
    for block in rollout.transformer_cache.network_cache.block_caches:
        block.self_attn.reset()
    rollout.autoregressive_index = None
    assert same(chunks(pipeline, rollout, 1), made)
    assert reused(enabled) == (4 if method == "step_hold" else 0)


def test_what_cannot_be_done_is_said() -> None:
    pipeline = dreams.wan()
    with pytest.raises(ValueError, match="give one per level, outermost first: model, block, sublayer"):
        holdover.enable(pipeline, [holdover.policy("fbcache"), holdover.policy("step_hold")])
    with pytest.raises(ValueError, match=r"fastercache tells guidance branches apart.*within one call"):
        holdover.enable(pipeline, holdover.policy("fastercache"))
    with pytest.raises(ValueError, match="frontier computes parts of blocks"):
        holdover.enable(pipeline, [holdover.policy("step_hold"), holdover.policy("frontier")])
    assert not hasattr(pipeline.diffusion_model.transformer, "_holdover")  # all of it, or nothing
    with pytest.raises(ValueError, match="TemplateDiT does not declare its blocks; name them"):
        holdover.enable(dreams.template(), holdover.policy("fbcache"))
    holdover.enable(pipeline, holdover.policy("step_hold"))
    model = pipeline.diffusion_model

    class Strange(type(model.scheduler)):  # type: ignore[misc]
        """Another schedule than the one that it names, or a pass more."""

        def sample(self, initial_noise: Tensor, predict_flow: Any, rng: Any = None) -> Tensor:
            for timestep in self.ran:
                predict_flow(initial_noise, torch.tensor(timestep))
            return initial_noise

    listed = model.scheduler.denoising_step_list.tolist()
    for passes, number in (([listed[1]], 0), ([*listed, 0.0], 4), ([listed[0], listed[0]], 1)):
        other = dreams.wan()
        other.diffusion_model.scheduler.__class__ = Strange
        other.diffusion_model.scheduler.ran = passes
        holdover.enable(other, holdover.policy("step_hold"))
        for _ in range(2):
            with torch.no_grad(), pytest.raises(ValueError, match=rf"Strange runs pass {number} of 4 at timestep"):
                chunks(other, begin(other), 1)
    other = dreams.wan()
    other.diffusion_model.scheduler.config = object()
    with pytest.raises(ValueError, match=r"FlowMatchScheduler\.config has no num_inference_steps"):
        holdover.enable(other, holdover.policy("step_hold"))


def test_the_example_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = dreams.wan()

    class Prompted(type(pipeline)):  # type: ignore[misc]
        """It encodes its prompts, as FlashDreams' own pipeline for Wan does."""

        def initialize_cache(self, text: list[str], height: int, width: int) -> Any:
            return super().initialize_cache(
                {"text_embeddings": torch.ones(len(text), 3, 5), "height": height // 15, "width": width // 26}
            )

    pipeline.__class__ = Prompted
    names: dict[str, Any] = {"pipeline": pipeline}
    exec(example("docs/models.md", "FlashDreams"), names)
    assert names["video"].shape == (1, dreams.CHUNK, dreams.CHANNELS, 4, 4)
    assert "reused    18" in capsys.readouterr().out
    assert names["enabled"].cache.stats().computed == 27

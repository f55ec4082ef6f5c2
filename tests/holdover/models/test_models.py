"""Every known class of diffusers: found by its declaration, and right in all that a cache does to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from holdover.models.registry import adapters, find, models_markdown
from tests.holdover.models.contracts import CONTRACTS, REFUSED
from tests.holdover.models.models import TINY, Tiny

pytest.importorskip("diffusers", reason="needs the extra: pip install 'holdover[diffusers]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention.*"),
    pytest.mark.filterwarnings("ignore:In CPU autocast.*", "ignore:CPU Autocast.*"),
    pytest.mark.filterwarnings("ignore:.* could reuse nothing"),
]
each = pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.name)
EVERY_OTHER = holdover.fixed_interval(over="steps", every=2, front_anchors=0, warmup=0, protection="pass")
AS_ONE = holdover.fixed_interval(over="steps", every=2, span="all", front_anchors=0, warmup=0, protection="pass")
CLOSED = holdover.fixed_interval(warmup=10**6)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {}


@pytest.fixture
def model(tiny: Tiny, models: dict[str, nn.Module]) -> nn.Module:
    if tiny.name not in models:
        models[tiny.name] = tiny.make()
    return models[tiny.name]


def steps(tiny: Tiny, model: nn.Module, cache: holdover.Cache, count: int = 4, **inputs: Any) -> Iterator[Tensor]:
    stream = inputs.pop("stream", "default")
    for index in range(count):
        with cache.step(chunk=0, index=index, num_steps=count, stream=stream, commits=False):
            output = tiny.run(model, index, **inputs)
        yield output


@contextmanager
def held_over(model: nn.Module, reuse: list[bool]) -> Iterator[None]:
    """The naive twin: every block adds what it added last, or as one all that they added last, while ``reuse``."""
    adapter = find(model)
    assert adapter is not None
    blocks = [slot.block for slot in adapter.slots(model)]
    known: dict[int, tuple[Tensor, Any]] = {}

    def forward(number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = inspect.signature(original).bind(*args, **kwargs).arguments[adapter.hidden]
        if reuse[0]:
            added, rest = known[number]
            return x + added if rest is None else (*rest[: adapter.returns], x + added, *rest[adapter.returns :])
        before = x.clone()
        output = original(*args, **kwargs)
        y = output[adapter.returns] if isinstance(output, tuple) else output
        rest = None
        if isinstance(output, tuple):
            rest = tuple(item for n, item in enumerate(output) if n != adapter.returns)
        known[number] = y - before, rest
        return output

    originals = [block.forward for block in blocks]
    for number, (block, original) in enumerate(zip(blocks, originals, strict=True)):
        block.forward = lambda *a, n=number, o=original, **k: forward(n, o, *a, **k)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def test_every_class_of_diffusers_that_is_known_is_tested() -> None:
    import diffusers

    declared = {adapter.model for adapter in adapters() if hasattr(diffusers, adapter.model)}
    assert len(declared) >= 12
    assert declared == {tiny.name for tiny in TINY}


def test_a_host_is_short() -> None:
    declared = [Path(inspect.getfile(find)).with_name(name) for name in ("diffusers.py", "self_forcing.py")]
    assert sum(len(path.read_text().splitlines()) for path in declared) / len(adapters()) < 30


@each
def test_a_gate_that_never_opens_changes_no_bit(tiny: Tiny, model: nn.Module) -> None:
    expected = [tiny.run(model, index) for index in range(2)]
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with holdover.attach(model, CLOSED) as cache:
        outputs = list(steps(tiny, model, cache, 2))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes


@each
def test_reused_blocks_add_what_they_added(tiny: Tiny, model: nn.Module) -> None:
    reuse, expected = [False], []
    with held_over(model, reuse):
        for index in range(4):
            reuse[0] = index % 2 == 1
            expected.append(tiny.run(model, index))
    with holdover.attach(model, EVERY_OTHER) as cache:
        outputs = list(steps(tiny, model, cache))
    assert cache.stats().reused == cache.stats().computed > 0
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert not torch.equal(outputs[1], tiny.run(model, 1))


@each
def test_videos_of_two_sizes_interleaved_are_those_of_two_runs(tiny: Tiny, model: nn.Module) -> None:
    sizes = {"a": {"frames": 3, "seed": 0}, "b": {"frames": 2, "seed": 11}}
    policies = [holdover.policy("fbcache", threshold=0.4), AS_ONE]
    for policy in policies:
        alone = {}
        for stream, size in sizes.items():
            with holdover.attach(model, policy) as cache:
                alone[stream] = list(steps(tiny, model, cache, stream=stream, **size))
        with holdover.attach(model, policy) as cache:
            runs = {stream: steps(tiny, model, cache, stream=stream, **size) for stream, size in sizes.items()}
            for index, outputs in enumerate(zip(*runs.values(), strict=True)):
                for stream, output in zip(sizes, outputs, strict=True):
                    assert torch.equal(output, alone[stream][index])


@each
def test_the_grid_is_that_of_the_tokens(tiny: Tiny, model: nn.Module) -> None:
    """X-Cache samples tokens on it, and refuses a hidden state that is not whole frames of it."""
    adapter = find(model)
    assert adapter is not None
    with holdover.attach(model, holdover.xcache(protection="pass")) as cache:
        for chunk in range(3):
            with cache.step(chunk=chunk, commits=False):
                tiny.run(model, 0)
    assert cache.stats().reused > 0
    if adapter.grid is not None:
        (group,) = adapter.view_groups(model, **tiny.inputs(0, 3, 1, 0))
        assert (group.height, group.width) == (4, 6)


@each
def test_the_modulated_input_is_what_enters_attention(tiny: Tiny, model: nn.Module) -> None:
    adapter = find(model)
    assert adapter is not None
    if "modulated" not in adapter.taps:
        pytest.skip("declares no modulated input")
    block, seen = adapter.slots(model)[0].block, {}
    attention = getattr(block, "attn1", None) or getattr(block, "attn", None)
    assert isinstance(block, nn.Module)

    def tap(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["tap"] = adapter.taps["modulated"](module, *args, **kwargs)

    def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["attention"] = args[0] if args else kwargs["hidden_states"]

    handles = [
        block.register_forward_pre_hook(tap, with_kwargs=True),
        attention.register_forward_pre_hook(enters, with_kwargs=True),
    ]
    tiny.run(model, 0)
    for handle in handles:
        handle.remove()
    assert torch.allclose(seen["tap"].to(seen["attention"]), seen["attention"], atol=1e-5)


@each
@pytest.mark.parametrize("name", ["time embedding", "time projection"])
def test_the_embedding_of_the_timestep_is_what_its_module_gives(tiny: Tiny, model: nn.Module, name: str) -> None:
    """TeaCache measures its change from step to step; the presets for Wan and CogVideoX read it."""
    adapter = find(model)
    assert adapter is not None
    if name not in adapter.tapped:
        pytest.skip(f"declares no {name}")
    module = model.get_submodule(adapter.embedding or "time_embedding")
    given: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda m, a, output: given.append(output if isinstance(output, Tensor) else output[name == "time projection"])
    )
    attributes = {key: dict(each.__dict__) for key, each in model.named_modules()}
    policy = holdover.policy("teacache", of=name, threshold=1e9, retain=1, last=False)
    with holdover.attach(model, policy) as cache:
        list(steps(tiny, model, cache, 3))
    assert {key: dict(each.__dict__) for key, each in model.named_modules()} == attributes
    assert len(module._forward_hooks) == 1  # ours here
    handle.remove()
    moved = [float((now - then).abs().mean() / then.abs().mean()) for then, now in pairwise(given)]
    summed = [decision.scores["drift"] for decision in cache.trace if decision.block == 0 and decision.scores]
    assert summed == pytest.approx([moved[0], moved[0] + moved[1]], rel=1e-5)


@each
def test_rows_of_a_batch_run_without_the_others(tiny: Tiny, model: nn.Module) -> None:
    adapter = find(model)
    assert adapter is not None
    if adapter.rows is None:
        pytest.skip("a batch is computed whole")
    alone = [tiny.run(model, 0, seed=7 * row) for row in range(2)]
    with holdover.attach(model, EVERY_OTHER) as cache:
        with cache.step(chunk=0, index=0, num_steps=2, stream="a", commits=False):
            tiny.run(model, 0)
        with cache.step(
            rows=[
                holdover.Step(chunk=0, index=1, num_steps=2, stream="a", commits=False),
                holdover.Step(chunk=0, index=0, num_steps=2, stream="b", commits=False),
            ]
        ):
            output = tiny.run(model, 0, batch=2)
    assert cache.stats("a").reused == cache.stats("b").computed == len(adapter.slots(model))
    assert torch.allclose(output[0], alone[0][0], atol=1e-4)
    assert torch.allclose(output[1], alone[1][0], atol=1e-4)


@pytest.mark.parametrize("name", ["AnyFlowFARTransformer3DModel", "SanaWMLTX2RefinerTransformer3DModel"])
def test_a_chunk_causal_class_is_told_that_it_writes(name: str) -> None:
    tiny = next(tiny for tiny in TINY if tiny.name == name)
    model, inputs = tiny.make(), tiny.inputs(0, 3, 1, 0, write=True)
    with holdover.attach(model, holdover.xcache()) as cache:
        with pytest.raises(ValueError, match="writes the KV cache within a denoising step"), cache.step(chunk=0):
            model(**inputs, return_dict=False)
        with cache.step(chunk=0, role="kv_update"):
            model(**inputs, return_dict=False)
    assert cache.stats().reasons == {"kv update": 3}
    if "AnyFlow" in name:
        written = [held["full_cache"] for held in inputs["kv_cache"].values()]
    else:
        written = [held.captured_k_post for held in inputs["kv_cache"].layer_caches]
    assert all(keys.abs().sum() > 0 for keys in written)


@each
def test_a_video_whose_size_changes_is_computed_once(tiny: Tiny, model: nn.Module) -> None:
    expected = tiny.run(model, 1, frames=2)
    outputs = []
    with holdover.attach(model, AS_ONE) as cache:
        for index, frames in enumerate((3, 2, 2)):
            with cache.step(chunk=0, index=2 * index + 1, num_steps=6, commits=False):
                outputs.append(tiny.run(model, index, frames=frames))
    assert torch.equal(outputs[1], expected)
    assert outputs[2].shape == expected.shape
    reasons = [d.reason for d in cache.trace if d.block == 0]
    assert reasons == ["first", "shape", "reuse"]


def test_the_table_in_the_docs_is_that_of_the_adapters() -> None:
    page = Path(__file__).parents[3] / "docs" / "models.md"
    assert page.read_text(encoding="utf-8").endswith("\n\n" + models_markdown())


def test_a_video_transformer_that_is_not_known_is_explained() -> None:
    import diffusers

    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    video = {name for name in dir(diffusers) if name.endswith("Transformer3DModel")}
    unknown = video - {adapter.model for adapter in adapters()}
    assert len(unknown) > 5
    assert not {name for name in unknown if f"`{name}`" not in page}


def test_the_table_says_what_was_tested() -> None:
    piped = {  # test_diffusers.py, test_wan.py
        "WanTransformer3DModel",
        "AnyFlowFARTransformer3DModel",
        "CogVideoXTransformer3DModel",
        "SanaWMLTX2RefinerTransformer3DModel",
    }
    contracts = {find(contract.model()) for contract in (*CONTRACTS, *REFUSED)}
    for adapter in adapters():
        expected = "contract" if adapter in contracts else "pipeline" if adapter.model in piped else "class"
        assert adapter.tested == expected

"""`holdover.diffusers.enable` beside what changes or moves a transformer's weights: LoRA, and offloading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import holdover
import holdover.diffusers
from tests.holdover.models import pipelines
from tests.holdover.toy import one_thread

pytest.importorskip("diffusers", reason="needs the extra: pip install 'holdover[diffusers]'")
pytest.importorskip("transformers", reason="needs the extra: pip install 'holdover[diffusers]'")
pytest.importorskip("peft", reason="loads a LoRA for diffusers: pip install peft")
pytest.importorskip("accelerate", reason="offloads for diffusers: pip install accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention.*"),
    pytest.mark.filterwarnings("ignore:.* could reuse nothing"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]
CPU = torch.device("cpu")
#: TeaCache reads the weights of its first block; the interval holds over blocks one by one.
POLICIES = (
    holdover.policy("teacache", threshold=0.3),
    holdover.fixed_interval(over="steps", every=2, front_anchors=1, warmup=0, protection="pass"),
)


def run(pipe: Any, **more: Any) -> Tensor:
    return pipelines.video(pipe, num_frames=9, guidance_scale=3.0, **more)


def lora(seed: int) -> dict[str, Tensor]:
    """A LoRA of rank 2 on the attention of every block, faint enough that a gate does not notice."""
    source = torch.Generator().manual_seed(seed)
    return {
        f"transformer.blocks.{block}.attn1.{layer}.lora_{side}.weight": 0.05 * torch.randn(shape, generator=source)
        for block in range(3)
        for layer in ("to_q", "to_v")
        for side, shape in (("A", (2, 24)), ("B", (24, 2)))
    }


@pytest.fixture(scope="module")
@one_thread()  # as the tests are: another number rounds otherwise
def adapted() -> dict[str, Tensor]:
    """What the pipeline makes with each LoRA, nothing cached."""
    pipe = pipelines.wan()
    outputs = {"none": run(pipe)}
    for name, seed in (("a", 3), ("b", 4)):
        pipe.load_lora_weights(lora(seed), adapter_name=name)
        outputs[name] = run(pipe)
    outputs["half of b"] = run(pipe, attention_kwargs={"scale": 0.5})
    return outputs


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_a_lora_under_a_gate_that_never_opens_changes_no_bit(adapted: dict[str, Tensor], loaded: str) -> None:
    pipe = pipelines.wan()
    if loaded == "before":
        pipe.load_lora_weights(lora(3), adapter_name="a")
    enabled = holdover.diffusers.enable(pipe, holdover.policy("fbcache", threshold=0.0))
    if loaded == "after":
        pipe.load_lora_weights(lora(3), adapter_name="a")
    assert torch.equal(run(pipe), adapted["a"])
    enabled.disable()
    assert not any(name in vars(pipe.transformer) for name in holdover.diffusers.REWEIGHTING)
    assert torch.equal(run(pipe), adapted["a"])
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), adapted["none"])


def test_nothing_is_held_over_from_other_weights(adapted: dict[str, Tensor]) -> None:
    """X-Cache reuses what it may of a video that comes again, unless the weights have changed."""
    pipe = pipelines.wan()
    enabled = holdover.diffusers.enable(pipe, holdover.xcache())
    changes: list[tuple[str, Callable[[], Any], dict[str, Any]]] = [
        ("none", lambda: None, {}),
        ("a", lambda: pipe.load_lora_weights(lora(3), adapter_name="a"), {}),
        ("b", lambda: pipe.load_lora_weights(lora(4), adapter_name="b"), {}),
        ("a", lambda: pipe.set_adapters("a"), {}),
        ("b", lambda: pipe.set_adapters("b"), {}),
        ("half of b", lambda: None, {"attention_kwargs": {"scale": 0.5}}),
        ("none", pipe.disable_lora, {}),
        ("b", pipe.enable_lora, {}),
        ("b", lambda: pipe.fuse_lora(adapter_names=["b"]), {}),
        ("b", pipe.unfuse_lora, {}),
        ("none", pipe.unload_lora_weights, {}),
    ]
    with enabled.stream("one"):
        for name, change, more in changes:
            change()
            before = enabled.cache.stats().reused
            assert torch.allclose(run(pipe, **more), adapted[name], rtol=0, atol=1e-5)
            assert enabled.cache.stats().reused == before
            run(pipe, **more)
            assert enabled.cache.stats().reused == before + 2 * 6 * 2  # branches, steps, blocks but the front anchor


def by_model(pipe: Any, folder: Path) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def by_layer(pipe: Any, folder: Path) -> None:
    """What `enable_sequential_cpu_offload` does: weights are on the device ``meta`` but while a layer runs."""
    import accelerate

    accelerate.cpu_offload(pipe.transformer, CPU)


def by_blocks(pipe: Any, folder: Path) -> None:
    """Two blocks at a time; weights are on the disk, and what stands in for them is not initialised."""
    pipe.transformer.enable_group_offload(
        CPU, offload_type="block_level", num_blocks_per_group=2, offload_to_disk_path=str(folder)
    )


def by_leaf(pipe: Any, folder: Path) -> None:
    pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


@pytest.fixture(scope="module")
@one_thread()  # as the tests are: another number rounds otherwise
def cached() -> list[Tensor]:
    """What the pipeline makes without a cache, then under each policy, its weights in their place."""
    pipe = pipelines.wan()
    outputs = [run(pipe)]
    for policy in POLICIES:
        enabled = holdover.diffusers.enable(pipe, policy)
        outputs.append(run(pipe))
        assert enabled.cache.stats().reused > 0
        enabled.disable()
    return outputs


@pytest.mark.parametrize("offload", [by_model, by_layer, by_blocks, by_leaf])
@pytest.mark.parametrize("which", [0, 1])
def test_enabled_first_then_offloaded(
    cached: list[Tensor], offload: Callable[..., None], which: int, tmp_path: Path
) -> None:
    pipe = pipelines.wan()
    enabled = holdover.diffusers.enable(pipe, POLICIES[which])
    offload(pipe, tmp_path)
    for _ in range(2):
        assert torch.allclose(run(pipe), cached[1 + which], rtol=0, atol=1e-5)
    enabled.disable()
    assert torch.allclose(run(pipe), cached[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("offload", [by_layer, by_blocks, by_leaf])
def test_offloaded_first_is_refused(offload: Callable[..., None], tmp_path: Path) -> None:
    pipe = pipelines.wan()
    offload(pipe, tmp_path)
    with pytest.raises(ValueError, match="attach or enable first, then offload"):
        holdover.diffusers.enable(pipe, POLICIES[0])
    with pytest.raises(ValueError, match="attach or enable first, then offload"):
        holdover.attach(pipe.transformer, POLICIES[0])


def test_a_model_that_moves_as_a_whole_may_be_offloaded_before(cached: list[Tensor], tmp_path: Path) -> None:
    pipe = pipelines.wan()
    by_model(pipe, tmp_path)
    enabled = holdover.diffusers.enable(pipe, POLICIES[0])
    assert all(torch.equal(run(pipe), cached[1]) for _ in range(2))
    enabled.disable()
    assert torch.equal(run(pipe), cached[0])


def test_a_lora_for_offloaded_blocks(adapted: dict[str, Tensor]) -> None:
    """diffusers takes its hooks off and puts them on again; the dispatchers stay."""
    pipe = pipelines.wan()
    enabled = holdover.diffusers.enable(pipe, holdover.xcache())
    pipe.transformer.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=2)
    with enabled.stream("one"):
        run(pipe)
        pipe.load_lora_weights(lora(3), adapter_name="a")
        assert torch.allclose(run(pipe), adapted["a"], rtol=0, atol=1e-5)
        assert enabled.cache.stats().reused == 0
        run(pipe)
    assert enabled.cache.stats().reused == 2 * 6 * 2  # branches, steps, blocks but the front anchor

"""DeepCache on a U-Net of diffusers, against the same modules called by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import holdover
from holdover import Slot

diffusers = pytest.importorskip("diffusers")


def skips(block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...]]:
    """What a down block that is held over leaves for skip connections that nobody will follow."""
    return ((hidden_states,) * (len(block.resnets) + len(block.downsamplers or ())),)


@pytest.fixture(scope="module")
def unet() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
            norm_num_groups=4,
        ).eval()


def by_hand(unet: Any, x: Tensor, time: int, deep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The U-Net's output, and what its deep part gave: all but the first and the last block."""
    embedding = unet.time_embedding(unet.time_proj(torch.tensor([time])))
    first = unet.conv_in(x)
    hidden, shallow = unet.down_blocks[0](first, embedding)
    if deep is None:
        deep, stack = hidden, [first, *shallow]
        for block in unet.down_blocks[1:]:
            deep, more = block(deep, embedding)
            stack += more
        deep = unet.mid_block(deep, embedding)
        for block in unet.up_blocks[:-1]:
            deep = block(deep, tuple(stack[-2:]), embedding)
            stack = stack[:-2]
    last = unet.up_blocks[-1](deep, (first, shallow[0]), embedding)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(last))), deep


@torch.no_grad()
def test_the_deep_part_is_held_over_and_the_shallow_one_goes_on(unet: Any) -> None:
    blocks = [
        *(Slot(block, beside=skips) for block in unet.down_blocks),
        unet.mid_block,
        *unet.up_blocks,
    ]
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    inputs = [(x * (1 - index / 7), 999 - 100 * index) for index in range(7)]
    outputs = []
    with holdover.attach(unet, holdover.policy("deepcache", every=3), slots=blocks) as cache, torch.no_grad():
        for index, given in enumerate(inputs):
            with cache.step(chunk=0, index=index, num_steps=8):
                outputs.append(unet(*given).sample)
    deep: Tensor | None = None
    for index, (output, given) in enumerate(zip(outputs, inputs, strict=True)):
        expected, deep = by_hand(unet, *given, None if index % 3 == 0 else deep)
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    letters = "".join({"shallow": "S", "interval": "i", "reuse": "r"}[decision.reason] for decision in cache.trace)
    assert letters == "SiiiiiSSrrrrrSSrrrrrS" * 2 + "SiiiiiS"
    # Nothing is held but what the deep part gave.
    assert deep is not None
    assert cache.stats().bytes_held == deep.nbytes

"""TaylorSeer beside its released code.

The records are of Shenyi-Z/TaylorSeer, commit 288776dfd0cbb6e201c654c31cd22139f848a6cf. For Wan:
``wan_attention_forward`` of ``TaylorSeer-Wan2.1/wan/taylorseer/forwards`` under its own ``cal_type``, for two blocks.
What enters, the gates, and what self-attention, cross-attention and MLP give were prescribed, for two guidance branches
in turn. For HunyuanVideo and FLUX: a double block and a single block of theirs, tokens of the video and image, under
their own ``cache_init`` and ``cal_type``, in which what attention, MLP and the single block's last layer give were
prescribed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import holdover
from tests.holdover.released.replay import BRANCHES, Given, assert_replayed, record


class Block(nn.Module):
    """Self-attention and MLP are gated as they are added, cross-attention is not."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.cross, self.mlp = Given(), Given(), Given()

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        x = x + self.attention(x) * gates[:, 2:3]
        x = x + self.cross(x)
        y: Tensor = x + self.mlp(x) * gates[:, 5:6]
        return y


class Wan(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, gates)
        return x

    def holdover_slots(self) -> list[holdover.Slot]:
        kinds = {"attention": "spatial", "cross": "cross", "mlp": "mlp"}
        return [
            holdover.Slot(f"blocks.{index}.{name}", kind=kind)  # type: ignore[arg-type]
            for index in range(len(self.blocks))
            for name, kind in kinds.items()
        ]


def test_the_preset_is_the_released_code() -> None:
    recorded = record("taylorseer_wan")
    passes, blocks = recorded["attention"].shape[:2]
    model, outputs = Wan(blocks), []
    with holdover.attach(model, holdover.policy("taylorseer", preset="released-wan")) as cache:
        for number in range(passes):
            for index, block in enumerate(model.blocks):
                for name in ("attention", "cross", "mlp"):
                    getattr(block, name).given = recorded[name][number, index]
            index, branch = divmod(number, 2)
            with cache.step(chunk=0, index=index, num_steps=passes // 2, branch=BRANCHES[branch]):
                outputs.append(model(recorded["input"][number], recorded["gates"][number]))
    assert {decision.block for decision in cache.trace} == set(range(3 * blocks))
    for slot in range(3 * blocks):
        assert_replayed(cache, slot, outputs, recorded)


class TwoStreams(nn.Module):
    """A double block and a single block. Each of what they add is gated."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp, self.total = Given(), Given(), Given()

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        x = x + self.attention(x) * gates[:, 0:1]
        x = x + self.mlp(x) * gates[:, 1:2]
        y: Tensor = x + self.total(x) * gates[:, 2:3]
        return y

    def holdover_slots(self) -> list[holdover.Slot]:
        return [holdover.Slot("attention", kind="spatial"), *(holdover.Slot(n, kind="mlp") for n in ("mlp", "total"))]


@pytest.mark.parametrize("name", ["hunyuan", "flux"])
def test_the_preset_is_the_released_code_of_two_streams(name: str) -> None:
    recorded, model, outputs = record(f"taylorseer_{name}"), TwoStreams(), []
    passes = len(recorded["computed"])
    with holdover.attach(model, holdover.policy("taylorseer", preset=f"released-{name}")) as cache:
        for index in range(passes):
            for part in ("attention", "mlp", "total"):
                getattr(model, part).given = recorded[part][index]
            with cache.step(chunk=0, index=index, num_steps=passes):
                outputs.append(model(recorded["input"][index], recorded["gates"][index]))
    for slot in range(3):
        assert_replayed(cache, slot, outputs, recorded)


def test_the_whole_model_is_one_forecast() -> None:
    """On a line, the model's output is forecast exactly, whatever enters."""
    model, outputs = Given(), []
    with holdover.attach(model, holdover.policy("taylorseer", every=4, span="model")) as cache:
        for index in range(12):
            model.given = torch.full((1, 3, 4, 4), 0.25 * index)
            with cache.step(chunk=0, index=index, num_steps=12):
                outputs.append(float(model(torch.randn(1, 3, 4, 4))[0, 0, 0, 0]))
    assert outputs[4:] == [0.25 * index for index in range(4, 12)]
    assert cache.stats().reused == 9

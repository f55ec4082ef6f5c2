"""Records of what released code decided and returned for prescribed inputs, and modules that prescribe them here.

Each record was made by running the authors' own code by hand, in float32 on a processor. It holds numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import holdover

#: Guidance branches in the order in which released code runs them.
BRANCHES = ("cond", "uncond")

#: How far a prediction may be from the recorded one, absolute and relative.
TOLERANCE = 1e-6


def record(name: str) -> dict[str, Tensor]:
    """A record's tensors by name."""
    return load_file(Path(__file__).parent / "records" / f"{name}.safetensors")


class Given(nn.Module):
    """Gives what it is told, whatever enters."""

    given: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.given.clone()

    def holdover_slots(self) -> list[holdover.Slot]:
        return [holdover.Slot(self)]


class Stages(nn.Module):
    """Blocks one after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Given() for _ in range(count))

    def give(self, *values: Tensor) -> None:
        """What each block gives next."""
        for block, value in zip(self.blocks, values, strict=True):
            block.given = value

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def holdover_slots(self) -> list[holdover.Slot]:
        return [holdover.Slot(f"blocks.{index}") for index in range(len(self.blocks))]


def replay(
    policy: holdover.Policy, probe: int, recorded: dict[str, Tensor], branches: Sequence[str] = ("",), **options: Any
) -> tuple[holdover.Cache, list[Tensor]]:
    """Run a policy on a record's passes."""
    passes = list(zip(recorded["input"], recorded["probe"], recorded["output"], strict=True))
    return run(policy, probe, passes, branches, **options)


def replay_model(
    policy: holdover.Policy, recorded: dict[str, Tensor], branches: Sequence[str] = ("",)
) -> tuple[holdover.Cache, list[Tensor]]:
    """Run a policy on a record's passes, in a model of one block, which may be the whole model to the policy."""
    model, outputs, passes = Given(), [], len(recorded["output"])
    with holdover.attach(model, policy) as cache:
        for number, model.given in enumerate(recorded["output"]):
            index, branch = number // len(branches), branches[number % len(branches)]
            with cache.step(chunk=0, index=index, num_steps=passes // len(branches), branch=branch):
                outputs.append(model(recorded.get("input", recorded["output"])[number]))
    return cache, outputs


def run(
    policy: holdover.Policy,
    probe: int,
    passes: Sequence[tuple[Tensor, Tensor, Tensor]],
    branches: Sequence[str] = ("",),
    **options: Any,
) -> tuple[holdover.Cache, list[Tensor]]:
    """Run a policy on passes, each of what enters, what leaves a probe of so many blocks and what leaves the last."""
    model, outputs = Stages(probe + 1), []
    with holdover.attach(model, policy, **options) as cache:
        for number, (x, z, y) in enumerate(passes):
            model.give(*[x] * (probe - 1), z, y)
            index, branch = number // len(branches), branches[number % len(branches)]
            with cache.step(chunk=0, index=index, num_steps=len(passes) // len(branches), branch=branch):
                outputs.append(model(x))
    return cache, outputs


def assert_replayed(cache: holdover.Cache, block: int, outputs: list[Tensor], recorded: dict[str, Tensor]) -> None:
    """The same passes were computed, and what stood in for the others is what was returned."""
    computed = [decision.computed for decision in cache.trace if decision.block == block]
    assert computed == recorded["computed"].bool().tolist()
    assert 0 < sum(computed) < len(computed)
    reused = torch.stack([output for output, was in zip(outputs, computed, strict=True) if not was])
    torch.testing.assert_close(reused, recorded["returned"], rtol=TOLERANCE, atol=TOLERANCE)

"""Records of what released code decided and returned for prescribed inputs, and modules that prescribe them here.

Each record was made by running the authors' own code by hand, in float32 on a processor. It holds numbers alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import holdover

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


class Stages(nn.Module):
    """Blocks one after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Given() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def holdover_slots(self) -> list[holdover.Slot]:
        return [holdover.Slot(f"blocks.{index}") for index in range(len(self.blocks))]


def assert_replayed(cache: holdover.Cache, block: int, outputs: list[Tensor], recorded: dict[str, Tensor]) -> None:
    """The same passes were computed, and what stood in for the others is what was returned."""
    computed = [decision.computed for decision in cache.trace if decision.block == block]
    assert computed == recorded["computed"].bool().tolist()
    assert 0 < sum(computed) < len(computed)
    reused = torch.stack([output for output, was in zip(outputs, computed, strict=True) if not was])
    torch.testing.assert_close(reused, recorded["returned"], rtol=TOLERANCE, atol=TOLERANCE)

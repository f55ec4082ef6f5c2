"""Stacks of blocks whose arithmetic can be checked by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import holdover

#: Reuses whatever is held, so that a test sees what the engine alone decides.
EAGER = holdover.xcache(front_anchors=0, warmup=0, tau_floor=-1.0, tau_dev=1e9)


class Scale(nn.Module):
    """``x -> x * factor``; reuse adds a held residual instead, so the two differ as soon as x does."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.factor


class Stack(nn.Module):
    """Runs its blocks one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        for block in self.blocks:
            out = block(x, **kwargs)
            x = out[0] if isinstance(out, tuple) else out
        return x

    def holdover_slots(self) -> list[nn.Module]:
        return list(self.blocks)


class FailOnce:
    """A forward hook that fails the first time, when the module has run."""

    def __init__(self) -> None:
        self.failed = False

    def __call__(self, *_: Any) -> None:
        if not self.failed:
            self.failed = True
            raise RuntimeError("out of order")


def ones(value: float = 1.0, *, tokens: int = 3, batch: int = 1) -> Tensor:
    return torch.full((batch, tokens, 2), float(value))


def reasons(cache: holdover.Cache) -> list[str]:
    return [decision.reason for decision in cache.trace]

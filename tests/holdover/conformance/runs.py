"""Runs of the toy model, and what is compared of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import holdover
from tests.holdover.registry import DEFAULTS
from tests.holdover.toy import FEW, ToyLoop, ToyModel, drive

each = pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.id)
#: A schedule has no gate to ask, and where it leaves nothing to reuse the engine says so.
closed = pytest.mark.filterwarnings("ignore:.* could reuse nothing")


def condition(loop: ToyLoop) -> float:
    """Changes in the middle of a run's last cycle."""
    return 0.0 if loop.chunk < (17 if len(loop.sigmas) <= len(FEW) else 6) else 0.3


def play(model: ToyModel, loop: ToyLoop, runner: Any, chunks: int) -> list[Tensor]:
    return [loop.step(model, action, runner, condition(loop)) for action in drive(chunks, loop.chunk)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def kv_tensors(loop: ToyLoop) -> list[Tensor]:
    return [tensor for kv in loop.kv.values() for pair in kv.values() for tensor in pair]


def decisions(cache: holdover.Cache, stream: str = "default") -> list[tuple[Any, ...]]:
    return [
        (d.branch, d.chunk, d.index, d.block, d.computed, d.reason, dict(d.scores))
        for d in cache.trace
        if d.stream == stream
    ]

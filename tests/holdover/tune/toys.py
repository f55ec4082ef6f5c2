"""Models with their loops, as a user's factory returns them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import holdover
from holdover.tune.loop import Loop
from tests.holdover.engine.models import Scale, Stack, ones
from tests.holdover.toy import MANY, ToyLoop, ToyModel, cached, drive


def few_chunks() -> tuple[ToyModel, Loop]:
    """Many steps, two chunks, two guidance branches."""
    model = ToyModel()

    def loop(cache: holdover.Cache) -> list[Tensor]:
        running = ToyLoop(sigmas=MANY, branches=("", "uncond"))
        return [running.step(model, action, cached(cache)) for action in drive(2)]

    return model, loop


def many_chunks() -> tuple[ToyModel, Loop]:
    """Few steps, two cycles of four chunks."""
    model = ToyModel()

    def loop(cache: holdover.Cache) -> list[Tensor]:
        running = ToyLoop()
        return [running.step(model, action, cached(cache)) for action in drive(8)]

    return model, loop


def scales(chunks: int, steps: int) -> tuple[nn.Module, Loop]:
    """Blocks that double, and no taps: an input of ones, at every pass."""
    model = Stack(Scale(), Scale(), Scale())

    def loop(cache: holdover.Cache) -> dict[str, Tensor]:
        made = {}
        for chunk in range(chunks):
            for index in range(steps):
                with cache.step(chunk=chunk, index=index, num_steps=steps, commits=False):
                    made[f"{chunk} {index}"] = model(ones())
        return made

    return model, loop


def one_chunk() -> tuple[nn.Module, Loop]:
    return scales(1, 4)


def single_pass() -> tuple[nn.Module, Loop]:
    return scales(1, 1)


def silent() -> tuple[nn.Module, Callable[[holdover.Cache], None]]:
    """Its loop returns nothing."""
    model, loop = one_chunk()

    def quiet(cache: holdover.Cache) -> None:
        loop(cache)

    return model, quiet


def growing() -> tuple[nn.Module, Loop]:
    """Its loop runs one more chunk at each call."""
    count = [1]

    def loop(cache: holdover.Cache) -> Tensor:
        count[0] += 1
        for chunk in range(count[0]):
            with cache.step(chunk=chunk):
                output: Tensor = model(ones())
        return output

    model = Stack(Scale(), Scale())
    return model, loop


def nothing() -> None:
    """No model and no loop."""


def noisy() -> tuple[nn.Module, Loop]:
    """Its loop draws other noise at each call."""
    model = Stack(Scale(), Scale())

    def loop(cache: holdover.Cache) -> Tensor:
        outputs = []
        for index in range(2):
            with cache.step(chunk=0, index=index, num_steps=2):
                outputs.append(model(torch.rand(1, 3, 2)))
        return torch.cat(outputs)

    return model, loop

"""Distillation against a teacher whose flow is known: that of a normal distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from holdover.world.losses import distillation_loss, error
from holdover.world.recipe import Recipe
from holdover.world.segments import Batch

from .small import latents, small_model

MEAN, UNTOLD, DEVIATION = 0.3, 0.1, 0.5  # of a teacher that is told the action, and of one that is not


class Teacher:
    """Predicts what is expected of a normal distribution, whatever the context; counts what it is shown."""

    def __init__(self) -> None:
        self.contexts: list[Tensor] = []

    def __call__(self, x: Tensor, *, sigma: float, action_BFA: Tensor | None, write: bool = False, **_: Any) -> Tensor:
        if write:
            self.contexts.append(x)
            return x
        gain = (1 - sigma) * DEVIATION**2 / ((1 - sigma) ** 2 * DEVIATION**2 + sigma**2)
        mean = UNTOLD if action_BFA is None else MEAN
        return mean + gain * (x - (1 - sigma) * mean)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("seed", range(4))  # other levels
def test_a_student_learns_where_the_flow_ends(seed: int, guidance: float) -> None:
    model = small_model()
    window = model.sizes.window
    recipe = Recipe(levels=4, teacher_steps=400, teacher_guidance=guidance)
    mean = UNTOLD + guidance * (MEAN - UNTOLD)  # predictions are linear in it
    frames = model.sizes.context + 2 * window  # the windows of the context, one of the student's own, and the last
    batch = Batch(latents(model, frames), torch.rand(1, frames, 2))
    teacher, guess, last = Teacher(), torch.full((1,), 0.8, requires_grad=True), {}

    def student(x: Tensor, *, sigma: Any, write: bool = False, **_: Any) -> Tensor:
        if not write:
            last.update(x=x, sigma=sigma)
        return guess.expand_as(x).clone()

    loss = distillation_loss(student, teacher, model, batch, np.random.default_rng(seed), recipe)
    sigma = float(last["sigma"])
    ends = mean + DEVIATION * (last["x"] - (1 - sigma) * mean) / ((1 - sigma) ** 2 * DEVIATION**2 + sigma**2) ** 0.5
    expected = error(guess.expand_as(ends), ends, last["sigma"], recipe)
    torch.testing.assert_close(loss, expected, atol=0.0, rtol=0.02)
    recorded = model.sizes.context // window
    assert torch.equal(torch.cat(teacher.contexts[:recorded], 1), batch.latents[:, : model.sizes.context])
    assert all((context == 0.8).all() for context in teacher.contexts[recorded:])
    assert len(teacher.contexts) == recorded + 1
    loss.backward()
    assert guess.grad is not None

"""Distillation against a teacher whose flow is known: that of a normal distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from holdover.world.config import WorldConfig
from holdover.world.inverse_dynamics import InverseDynamics, train_inverse_dynamics
from holdover.world.losses import distillation_loss, error
from holdover.world.recipe import Recipe
from holdover.world.segments import Batch, Segments

from .small import latents, small_config, small_model

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


def shown_frames(seed: int, window: int) -> int:
    """How many frames of the last window a loss takes for shown: its second draw."""
    rng = np.random.default_rng(seed)
    rng.integers(2**62)
    return int(rng.integers(window))


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

    loss, parts = distillation_loss(student, teacher, model, batch, np.random.default_rng(seed), recipe)
    sigma, shown = float(last["sigma"]), shown_frames(seed, window)
    ends = mean + DEVIATION * (last["x"] - (1 - sigma) * mean) / ((1 - sigma) ** 2 * DEVIATION**2 + sigma**2) ** 0.5
    unknown = ends[:, shown:]
    expected = error(guess.expand_as(unknown), unknown, last["sigma"], recipe)
    assert not parts
    torch.testing.assert_close(loss, expected, atol=0.0, rtol=0.02)
    recorded = model.sizes.context // window
    assert torch.equal(torch.cat(teacher.contexts[:recorded], 1), batch.latents[:, : model.sizes.context])
    assert all((context == 0.8).all() for context in teacher.contexts[recorded:])
    assert len(teacher.contexts) == recorded + 1
    loss.backward()
    assert guess.grad is not None


class Witness(InverseDynamics):
    """Remembers which frames it was to judge."""

    def disagreement(
        self, before_BNP: Tensor, after_BNP: Tensor, true: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> Tensor:
        self.frames = before_BNP, after_BNP, *true
        return after_BNP.mean()


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_motion_is_read_from_the_next_frame_to_be_shown(seed: int, windows: int) -> None:
    model = small_model()
    sizes, recipe = model.sizes, Recipe(levels=4, teacher_steps=1, motion_weight=3.0)
    frames = sizes.context + windows * sizes.window
    batch = Batch(latents(model, frames), torch.rand(1, frames, 2))
    reader, made = Witness(sizes), {}

    def student(x: Tensor, **_: Any) -> Tensor:
        made["last"] = torch.rand_like(x, requires_grad=True)
        return made["last"]

    torch.manual_seed(seed)
    loss, parts = distillation_loss(student, Teacher(), model, batch, np.random.default_rng(seed), recipe, reader)
    shown = shown_frames(seed, sizes.window)
    before, after, *true = reader.frames
    place = frames - sizes.window + shown
    assert torch.equal(after, made["last"][:, shown])
    assert torch.equal(torch.stack(true, 1), batch.latents[:, place - 1 : place + 1])
    recorded = torch.equal(before, batch.latents[:, place - 1])
    assert recorded == (windows == 1 and shown == 0)  # what stands before it is else the student's own
    assert loss.item() == pytest.approx(parts["flow"] + 3 * parts["motion"], rel=1e-6)
    assert parts["motion"] == pytest.approx(after.mean().item())
    loss.backward()  # through the frame itself
    with_motion = made["last"].grad
    assert with_motion is not None
    assert with_motion[:, shown].abs().sum() > 0


def segments(sizes: WorldConfig, clips: int, seed: int) -> Segments:
    """Clips whose latents change by a direction times the action, under much else."""
    torch.manual_seed(0)
    direction = torch.randn(2, sizes.tokens, sizes.patch_values)
    torch.manual_seed(seed)
    found = object.__new__(Segments)
    actions = torch.rand(clips, 1, 12, 2) * 2 - 1
    still = torch.randn(clips, 1, 1, sizes.tokens, sizes.patch_values)
    moved = torch.einsum("cbfa,anp->cbfnp", actions.cumsum(2), direction)
    found.clips = [Batch(latents, action) for latents, action in zip(still + moved, actions, strict=True)]
    return found


def test_an_inverse_dynamics_model_reads_actions_back() -> None:
    sizes = small_config()
    known, other = segments(sizes, 60, 1), segments(sizes, 20, 2)
    reader, twin = (train_inverse_dynamics(known, sizes, steps=150, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(reader.parameters(), twin.parameters(), strict=True))
    unseen = other.batch([(clip, 3) for clip in range(20)], 2, "cpu")
    before, after, actions = unseen.latents[:, 0], unseen.latents[:, 1], unseen.actions[:, 1]
    errors = (reader(before, after) - actions).abs().mean()
    assert errors < 0.15  # of actions that are 0.5 away from 0 in the mean
    # A frame that did not move is told to, in the direction of the truth.
    generator = torch.Generator().manual_seed(0)
    still = before.clone().requires_grad_()
    wrong = reader.disagreement(before, still, (before, after), generator)
    wrong.backward()
    assert still.grad is not None
    assert ((after - before) * -still.grad).sum() > 0
    assert reader.disagreement(before, after, (before, after), generator) < wrong / 2


def test_what_a_reader_does_not_see_does_not_count() -> None:
    sizes = small_config()
    reader = InverseDynamics(sizes)
    frames = torch.randn(2, 3, sizes.tokens, sizes.patch_values)
    seen = torch.rand(3, sizes.tokens) < 0.5
    changed = torch.where(seen[..., None], frames, torch.randn_like(frames))
    torch.testing.assert_close(reader(*frames, seen), reader(*changed, seen))
    assert not torch.allclose(reader(*frames), reader(*changed))

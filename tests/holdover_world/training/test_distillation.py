"""Distillation against a teacher whose flow is known: that of a normal distribution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from holdover_world.model.history import WorldHistory
from holdover_world.model.sampler import noise_levels
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.layout import Track
from holdover_world.training.losses import distillation_loss, error, hold_actions, straight_on
from holdover_world.training.recipe import Recipe
from holdover_world.training.segments import Batch
from tests.holdover_world.small import latents, small_layout, small_model

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
    window, context, own = model.sizes.window, model.sizes.context, 3
    recipe = Recipe(levels=4, teacher_steps=400, teacher_guidance=guidance)
    mean = UNTOLD + guidance * (MEAN - UNTOLD)  # predictions are linear in it
    batch = Batch(latents(model, context + own * window), torch.rand(1, context + own * window, 2))
    teacher, guess = Teacher(), torch.full((1,), 0.8, requires_grad=True)
    passes: list[tuple[float, Tensor, bool]] = []
    written: list[tuple[Tensor, Tensor, bool]] = []

    def student(x: Tensor, *, sigma: float, action_BFA: Tensor, write: bool = False, **_: Any) -> Tensor:
        if write:
            written.append((x, action_BFA, torch.is_grad_enabled()))
        else:
            passes.append((sigma, x, torch.is_grad_enabled()))
        return guess.expand_as(x).clone()

    loss = distillation_loss(student, teacher, model, batch, np.random.default_rng(seed), recipe)
    # Every window is sampled in four passes; one of them is learned from, on what the sampler showed it.
    assert [sigma for sigma, _, _ in passes] == [*noise_levels(4, recipe.shift)] * own
    compared = [(sigma, x) for sigma, x, graded in passes if graded]
    assert [sum(graded for *_, graded in passes[4 * i : 4 * i + 4]) for i in range(own)] == [1] * own
    losses = []
    for sigma, x in compared:
        noise = x if sigma == 1 else (x - (1 - sigma) * 0.8) / sigma
        assert abs(noise.mean().item()) < 0.15
        ends = mean + DEVIATION * (x - (1 - sigma) * mean) / ((1 - sigma) ** 2 * DEVIATION**2 + sigma**2) ** 0.5
        losses.append(error(guess.expand_as(ends), ends, torch.tensor([sigma]), recipe))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=0.0, rtol=0.02)
    # Both have the recorded context before them, then what the student made under commands that may be held.
    recorded = context // window
    assert torch.equal(torch.cat(teacher.contexts[:recorded], 1), batch.latents[:, :context])
    assert all((made == 0.8).all() for made in teacher.contexts[recorded:])
    assert len(teacher.contexts) == len(written) == recorded + own - 1
    assert all(torch.equal(x, shown) for (x, _, _), shown in zip(written, teacher.contexts, strict=True))
    for (_, told, _), commanded in zip(written, batch.actions.split(window, 1), strict=False):
        assert any(torch.equal(told, hold_actions(commanded, k)) for k in range(window))
    assert [graded for *_, graded in written] == [False] * (recorded - 1) + [True] * own
    loss.backward()
    assert guess.grad is not None


@pytest.mark.parametrize("seed", range(4))  # other levels
def test_a_student_without_a_teacher_learns_what_was_recorded(seed: int) -> None:
    """Under the recording's actions, from where it was after every window; what goes straight on was not recorded."""
    model = small_model()
    window, context, own = model.sizes.window, model.sizes.context, 2
    size = context + own * window
    track = Track(small_layout(), torch.rand(60, 3).double(), torch.rand(60, 2))
    batch = Batch(latents(model, size), torch.rand(1, size, 2), (track,), (5,))
    guess = torch.full((1,), 0.8, requires_grad=True)
    compared: list[tuple[float, Tensor | None, int]] = []
    stood: list[tuple[int, Tensor]] = []

    def student(
        x: Tensor, *, sigma: float, action_BFA: Tensor, history: WorldHistory, write: bool = False, **_: Any
    ) -> Tensor:
        number = len(stood) - 1
        if write:
            history.commit(x, action_BFA)
            stood.append((history.sites[0].frame if history.sites and history.sites[0] else -1, action_BFA))
        elif torch.is_grad_enabled():
            compared.append((sigma, history.sites[0] and history.sites[0].pose_3 if history.sites else None, number))
        return guess.expand_as(x).clone()

    recipe = Recipe(levels=4, recorded=True)
    loss = distillation_loss(student, None, model, batch, np.random.default_rng(seed), recipe)
    recorded = batch.latents[:, context:].split(window, 1)
    losses = [
        error(guess.expand_as(target), target, torch.tensor([sigma]), recipe)
        for (sigma, _, _), target in zip(compared, recorded, strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    for n, (_, pose, number) in enumerate(compared):
        assert number == context // window - 1 + n
        assert pose is not None
        assert torch.equal(pose, track.poses_T3[5 + 4 * (context + n * window) - 1])
    for (_, told), commanded in zip(stood, batch.actions.split(window, 1), strict=False):
        assert torch.equal(told, commanded)
    # Straight on a teacher says what is there, and the rollout goes where its own actions lead.
    batch.actions[:, :context, 1] = 0
    stood.clear()
    steady = replace(recipe, steady=1.0, teacher_steps=1)
    teacher = Teacher()
    assert distillation_loss(student, teacher, model, batch, np.random.default_rng(seed), steady) > 0
    assert len(teacher.contexts) == size // window - 1
    assert [frame for frame, _ in stood][context // window :] == [5 + 4 * (context + window) - 1]


@pytest.mark.parametrize("seed", range(4))  # other positions and levels
def test_a_later_chunk_is_to_say_what_the_first_said(seed: int) -> None:
    """A student that says another number at every level, and in later chunks 0.05 more with every frame.

    What it says of depth does not count.
    """
    model, weight = small_model(window=4), 3.0
    window, context = model.sizes.window, model.sizes.context
    recipe = Recipe(levels=4, teacher_steps=1, agreement=weight)
    sigmas = noise_levels(4, recipe.shift)
    said, more = {sigma: 0.2 + 0.13 * n for n, sigma in enumerate(sigmas)}, torch.full((1,), 0.05, requires_grad=True)
    ramp = torch.arange(window).view(1, window, 1, 1)
    batch = Batch(latents(model, context + window), torch.rand(1, context + window, 2))
    passes: list[tuple[float, Tensor, Tensor, bool]] = []

    def student(x: Tensor, *, sigma: float, action_BFA: Tensor, write: bool = False, **_: Any) -> Tensor:
        if write:
            return x
        passes.append((sigma, x, action_BFA, torch.is_grad_enabled()))
        first = len(passes) <= 4
        return (said[sigma] + more * (0 * ramp if first else ramp)).expand_as(x).clone()

    def loss(recipe: Recipe) -> Tensor:
        passes.clear()
        return distillation_loss(student, Teacher(), model, batch, np.random.default_rng(seed), recipe)

    alone = loss(replace(recipe, agreement=0.0))
    assert len(passes) == 4
    both = loss(recipe)
    first, later = passes[:4], passes[4:]
    assert 1 <= len(later) <= 3  # the pass that is all noise need not be made again
    assert [sigma for sigma, *_ in later] == [*sigmas[1 : len(later) + 1]]
    assert [graded for *_, graded in later] == [False] * (len(later) - 1) + [True]
    positions = set()
    for n, (sigma, x, actions, _) in enumerate(later, start=1):
        assert torch.equal(actions, first[n][2])
        before = said[sigmas[n - 1]]  # in both chunks what is drawn yet comes from the pass before
        noise = (first[n][1] - (1 - sigma) * before) / sigma
        known = (x - ((1 - sigma) * said[sigmas[-1]] + sigma * noise)).abs().amax((0, 2, 3)) < 1e-5
        drawn = before + (0.05 * ramp if n > 1 else 0)
        assert ((x - ((1 - sigma) * drawn + sigma * noise)).abs().amax((0, 2, 3)) < 1e-5).equal(~known)
        positions.add(int(known.sum()))
        assert known[: int(known.sum())].all()
    [position] = positions
    assert 1 <= position < window
    target = torch.full((1, window - position, 1, 1), said[later[-1][0]])
    expected = error(target + 0.05 * ramp[:, position:], target, torch.tensor([later[-1][0]]), recipe)
    expected = expected * depth_begins(model) / model.sizes.tokens
    torch.testing.assert_close(both - alone, weight * expected, atol=1e-6, rtol=1e-4)
    both.backward()
    assert more.grad is not None
    assert more.grad.item() > 0


def test_only_the_end_of_a_rollout_is_learned_from() -> None:
    model = small_model()
    window, context, own = model.sizes.window, model.sizes.context, 4
    batch = Batch(latents(model, context + own * window), torch.rand(1, context + own * window, 2))
    calls: list[tuple[bool, bool]] = []  # whether written, and whether learned from

    def student(x: Tensor, *, write: bool = False, **_: Any) -> Tensor:
        calls.append((write, torch.is_grad_enabled()))
        return x

    recipe = Recipe(levels=4, teacher_steps=1, learned=2)
    distillation_loss(student, Teacher(), model, batch, np.random.default_rng(0), recipe)
    learned = [graded for write, graded in calls if not write]
    assert [sum(learned[4 * i : 4 * i + 4]) for i in range(own)] == [0, 0, 1, 1]
    assert [graded for write, graded in calls if write][-3:] == [False, True, True]  # what those two look back on


def test_a_steady_rollout_goes_straight_on_where_the_road_does() -> None:
    model = small_model()
    window, context, own = model.sizes.window, model.sizes.context, 2
    actions = torch.rand(2, context + own * window, 2)
    actions[0, context - 1] = torch.tensor([0.6, -0.1])  # about straight
    actions[1, context - 1] = torch.tensor([0.4, 0.5])  # in a bend
    driven = straight_on(actions, context)
    assert torch.equal(driven[:, :context], actions[:, :context])
    assert (driven[0, context:] == torch.tensor([0.6, 0.0])).all()
    assert torch.equal(driven[1], actions[1])

    told: list[Tensor] = []

    def student(x: Tensor, *, action_BFA: Tensor, write: bool = False, **_: Any) -> Tensor:
        if not write:
            told.append(action_BFA)
        return x

    for steady, expected in ((1.0, driven), (0.0, actions)):
        told.clear()
        recipe = Recipe(levels=4, teacher_steps=1, steady=steady)
        batch = Batch(latents(model, context + own * window).expand(2, -1, -1, -1), actions)
        distillation_loss(student, Teacher(), model, batch, np.random.default_rng(0), recipe)
        first = expected[:, context : context + window]
        assert any(torch.equal(told[0], hold_actions(first, k)) for k in range(window))


def depth_begins(model: WorldModel) -> int:
    """The first token of depth."""
    return next(plane.start for plane in model.sizes.planes if plane.modality == "depth")

"""What a step of training minimises: flow matching on windows of recordings, or of the model's own making.

Lipman et al., arXiv 2210.02747; noisy latents are ``(1 - sigma) * clean + sigma * noise``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from holdover_world.model.history import WorldHistory
from holdover_world.model.sampler import denoise, follow_flow, shifted
from holdover_world.model.transformer import WorldModel
from holdover_world.training.recipe import Recipe
from holdover_world.training.segments import Batch
from holdover_world.training.trainer import Predict

#: Below it a clean prediction's error is not magnified further by making a velocity of it.
LEAST_SIGMA = 0.25
#: Normalised curvature up to which a road is about straight.
STRAIGHT = 0.15


def hold_actions(actions_BFA: Tensor, known: int) -> Tensor:
    """What a driver has commanded by the time frame ``known`` is drawn: later frames hold that action."""
    return torch.cat(
        [actions_BFA[:, : known + 1], actions_BFA[:, known:][:, :1].expand_as(actions_BFA[:, known + 1 :])], 1
    )


def straight_on(actions_BFA: Tensor, recorded: int) -> Tensor:
    """After the ``recorded`` frames their last speed, straight on; the actions as they are where the road bends."""
    before, after = actions_BFA[:, :recorded], actions_BFA[:, recorded:]
    held = before[:, -1:].clone()
    held[..., 1] = 0
    bends = before[:, -1:, 1:2].abs() > STRAIGHT
    return torch.cat([before, torch.where(bends, after, held)], 1)


def error(
    prediction: Tensor, target: Tensor, sigma_B: Tensor, recipe: Recipe, weight_N: Tensor | None = None
) -> Tensor:
    """Flow matching's velocity error of a clean prediction, and an absolute error beside it, weighted by token."""
    difference = (prediction.float() - target) / sigma_B.clamp(min=LEAST_SIGMA)[:, None, None, None]
    each = difference.square() + recipe.l1 * difference.abs()
    return each.mean() if weight_N is None else (each * weight_N[:, None]).mean()


def sequence_loss(
    predict: Predict,
    model: WorldModel,
    batch: Batch,
    rng: np.random.Generator,
    recipe: Recipe,
    *,
    plain: bool,
    own: bool,
) -> Tensor:
    """The loss of one segment: window by window, context written by clean passes, one noisy pass on every target.

    Args:
        plain: windows of one latent frame (and every window past the context is a target), else of a window.
        own: replace the contexts past the recorded one, and half of the noisy inputs, by what the model makes itself.
    """
    config, sigmas = model.sizes, recipe.sampler
    window = 1 if plain else config.window
    windows = batch.latents.shape[1] // window
    first_target = config.context // window
    device = batch.latents.device
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))

    def noise_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, device=device)

    history, losses = model.new_history(), []
    for i in range(windows):
        latents = batch.latents[:, i * window : (i + 1) * window]
        actions = batch.actions[:, i * window : (i + 1) * window]
        held = hold_actions(actions, int(rng.integers(window)))
        if i >= first_target:
            level = int(rng.integers(len(sigmas)))
            clean = latents
            if own and level and rng.random() < 0.5:
                known = latents[:, : int(rng.integers(window))]
                clean = _generate(predict, known, noise_like, latents, held, history, sigmas[:level])
            sigma_B = torch.full((len(latents),), sigmas[level], device=device)
            if not recipe.levels and clean is latents:
                sigma_B = shifted(torch.rand(len(latents), generator=generator, device=device), recipe.shift)
            sigma = sigma_B[:, None, None, None]
            noisy = (1 - sigma) * clean + sigma * noise_like(latents)
            told = None if rng.random() < recipe.unconditional_share else held
            losses.append(
                error(predict(noisy, sigma=sigma_B, action_BFA=told, history=history), latents, sigma_B, recipe)
            )
        if i == windows - 1:
            break
        context = latents
        if own and i >= first_target:
            context = _generate(predict, latents[:, :0], noise_like, latents, actions, history, sigmas)
        context = context + recipe.context_noise * rng.random() ** 2 * noise_like(context)
        shown = held if rng.random() < 0.5 else actions
        # The oldest context stays out of the backward pass, unless it is the only one: a sixth of a step saved.
        with torch.set_grad_enabled(i >= first_target or i == windows - 2):
            predict(context, sigma=0.0, action_BFA=shown, history=history, write=True)
        batch.stand(history, (i + 1) * window)
    return torch.stack(losses).mean()


def distillation_loss(
    predict: Predict, teacher: Predict | None, model: WorldModel, batch: Batch, rng: np.random.Generator, recipe: Recipe
) -> Tensor:
    """The loss of a few-step student: to say at once where its teacher's flow ends.

    After a recorded context it rolls out windows of its own, each the context of the next (Huang et al., Self Forcing,
    arXiv 2506.08009). In those that it learns from one of its sampler's passes, a random one, is compared with where
    the teacher, whose context is the same, comes to by following the flow from the same noisy window (the regression on
    a teacher's trajectories of Yin et al., CausVid, arXiv 2412.07772, section 4.3); with `Recipe.recorded` with what
    was recorded, unless the rollout goes straight on, which was not. With `Recipe.agreement` a later chunk of the
    window's cycle, which knows its first frames, is to say in colour what this first one said.
    """
    sizes = model.sizes
    steady = recipe.steady and rng.random() < recipe.steady
    commanded = straight_on(batch.actions, sizes.context) if steady else batch.actions
    generator = torch.Generator(batch.latents.device).manual_seed(int(rng.integers(2**62)))
    is_colour_N = torch.zeros(sizes.tokens, device=batch.latents.device)
    for plane in sizes.planes:
        is_colour_N[plane.tokens] = plane.modality == "colour"
    where_recorded = recipe.recorded and not steady
    rollout = _Rollout(predict, teacher, model.new_history(), model.new_history(), recipe, rng, is_colour_N)
    losses = []
    windows = list(zip(batch.latents.split(sizes.window, 1), commanded.split(sizes.window, 1), strict=True))
    first = max(sizes.context // sizes.window, len(windows) - recipe.learned if recipe.learned else 0)  # learned from
    for i, (latents, actions) in enumerate(windows):
        if i * sizes.window >= sizes.context:
            if not where_recorded and rng.random() < 0.5:  # in a cycle only the last chunk knows all actions
                actions = hold_actions(actions, int(rng.integers(sizes.window)))
            noise = torch.randn((len(rollout.sigmas), *latents.shape), generator=generator, device=latents.device)
            if i < first:
                latents = rollout.window(noise, actions)
            else:
                latents, loss = rollout.learn(noise, actions, latents if where_recorded else None)
                losses.append(loss)
        if i < len(windows) - 1:
            rollout.write(latents, actions, learned=i + 1 >= first)
        if where_recorded or (i + 1) * sizes.window == sizes.context:
            rollout.stand(batch, (i + 1) * sizes.window)
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class _Rollout:
    """A student's own windows, one after the other, and what it learns from them."""

    predict: Predict
    teacher: Predict | None
    history: WorldHistory
    teachers_history: WorldHistory
    recipe: Recipe
    rng: np.random.Generator
    is_colour_N: Tensor

    @property
    def sigmas(self) -> tuple[float, ...]:
        return self.recipe.sampler

    def window(self, noise: Tensor, actions: Tensor) -> Tensor:
        """The next window."""
        return denoise(lambda level, noisy: self._say(level, noisy, actions), noise, self.sigmas, known=())

    def learn(self, noise: Tensor, actions: Tensor, recorded: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next window, and the loss of a random one of its passes, against what was recorded or the teacher."""
        compared = int(self.rng.integers(len(self.sigmas)))
        said: list[Tensor] = []
        losses = []

        def step(level: int, noisy: Tensor) -> Tensor:
            clean = self._say(level, noisy, actions, learned=level == compared)
            if level == compared and (recorded is not None or self.teacher is not None):
                target = recorded if recorded is not None else self._where_the_flow_ends(level, noisy, actions)
                weight_N = self.is_colour_N + self.recipe.depth_weight * (1 - self.is_colour_N)
                losses.append(self._error(level, clean, target, weight_N))
            said.append(clean.detach())
            return said[-1]

        window = denoise(step, noise, self.sigmas, known=())
        if self.recipe.agreement and window.shape[1] > 1 and len(self.sigmas) > 1:
            losses.append(self.recipe.agreement * self._departure(window, said, noise, actions))
        return window, torch.stack(losses).sum()

    def write(self, latents: Tensor, actions: Tensor, *, learned: bool) -> None:
        """Make a window the context of the next."""
        if self.teacher is not None:
            with torch.no_grad():
                self.teacher(latents, sigma=0.0, action_BFA=actions, history=self.teachers_history, write=True)
        with torch.set_grad_enabled(learned):
            self.predict(latents, sigma=0.0, action_BFA=actions, history=self.history, write=True)

    def stand(self, batch: Batch, latent_frames: int) -> None:
        """The rollout is where the recordings were after so many latent frames."""
        for history in (self.history, self.teachers_history):
            if history.last is not None:
                batch.stand(history, latent_frames)

    def _say(self, level: int, noisy: Tensor, actions: Tensor, *, learned: bool = False) -> Tensor:
        with torch.set_grad_enabled(learned):
            clean: Tensor = self.predict(noisy, sigma=self.sigmas[level], action_BFA=actions, history=self.history)
            return clean.float()

    def _error(self, level: int, clean: Tensor, target: Tensor, weight_N: Tensor) -> Tensor:
        sigma_B = torch.full((len(clean),), self.sigmas[level], device=clean.device)
        return error(clean, target, sigma_B, self.recipe, weight_N)

    @torch.no_grad()
    def _where_the_flow_ends(self, level: int, noisy: Tensor, actions: Tensor) -> Tensor:
        """By the teacher's Euler steps from a noisy window at one of the sampler's levels."""
        guidance, teacher = self.recipe.teacher_guidance, self.teacher
        assert teacher is not None

        def guided(sigma: float, x: Tensor) -> Tensor:
            told: Tensor = teacher(x, sigma=sigma, action_BFA=actions, history=self.teachers_history).float()
            if guidance == 1:
                return told
            untold = teacher(x, sigma=sigma, action_BFA=None, history=self.teachers_history).float()
            return torch.lerp(untold, told, guidance)

        remaining = 1 - level / len(self.sigmas)  # of the way, before the shift
        count = math.ceil(remaining * self.recipe.teacher_steps)
        steps = remaining * torch.linspace(1, 1 / count, count)
        return follow_flow(guided, noisy, shifted(steps, self.recipe.shift).tolist())

    def _departure(self, window: Tensor, said: list[Tensor], noise: Tensor, actions: Tensor) -> Tensor:
        """How far one pass of a later chunk, a random one, departs from what the first said in it."""
        position, compared = int(self.rng.integers(1, window.shape[1])), int(self.rng.integers(1, len(self.sigmas)))
        losses = []

        def step(level: int, noisy: Tensor) -> Tensor:
            if level == 0:  # all noise: what is known does not show yet
                return said[0].clone()
            clean = self._say(level, noisy, actions, learned=level == compared)
            if level == compared:
                drawn, first = clean[:, position:], said[level][:, position:]
                losses.append(self._error(level, drawn, first, self.is_colour_N))
            return clean.detach().clone()  # what is known will be written into it

        upto = slice(compared + 1)
        denoise(step, noise[upto], self.sigmas[upto], known=window[:, :position])
        return losses[0]


@torch.no_grad()
def _generate(
    predict: Predict,
    known: Tensor,
    noise_like: Callable[[Tensor], Tensor],
    latents: Tensor,
    actions: Tensor,
    history: WorldHistory,
    sigmas: tuple[float, ...],
) -> Tensor:
    noise = torch.stack([noise_like(latents) for _ in sigmas])
    return denoise(
        lambda i, x: predict(x, sigma=sigmas[i], action_BFA=actions, history=history).float(), noise, sigmas, known
    )

"""The losses of training: flow matching on recorded windows, or on windows that the model generated itself.

Flow matching is that of Lipman et al., arXiv 2210.02747: noisy latents are ``(1 - sigma) * clean + sigma * noise``.
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

#: The velocity error is the error of the clean prediction divided by sigma, or by this where sigma is less.
LEAST_SIGMA = 0.25
#: Normalised curvature up to which a road counts as straight.
STRAIGHT = 0.15


def hold_actions(actions_BFA: Tensor, known: int) -> Tensor:
    """The actions that are known when latent frame ``known`` is generated: later frames hold its action."""
    return torch.cat(
        [actions_BFA[:, : known + 1], actions_BFA[:, known:][:, :1].expand_as(actions_BFA[:, known + 1 :])], 1
    )


def straight_on(actions_BFA: Tensor, recorded: int) -> Tensor:
    """After the ``recorded`` frames their last speed, straight on; where the road bends, the actions as they are."""
    before, after = actions_BFA[:, :recorded], actions_BFA[:, recorded:]
    held = before[:, -1:].clone()
    held[..., 1] = 0
    bends = before[:, -1:, 1:2].abs() > STRAIGHT
    return torch.cat([before, torch.where(bends, after, held)], 1)


def error(
    prediction: Tensor, target: Tensor, sigma_B: Tensor, recipe: Recipe, weight_N: Tensor | None = None
) -> Tensor:
    """The velocity error of a clean prediction: its square plus `Recipe.l1` times its size, weighted by token."""
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
    """The loss of one segment: clean passes write windows as context, and those past the recorded one are targets.

    Args:
        plain: windows of one latent frame, as in the plain cadence.
        own: replace contexts past the recorded one, and half of the noisy inputs, by what the model generates itself.
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
        # The oldest context stays out of the backward pass, unless it is the only one. This saves a sixth of a step.
        with torch.set_grad_enabled(i >= first_target or i == windows - 2):
            predict(context, sigma=0.0, action_BFA=shown, history=history, write=True)
        batch.stand(history, (i + 1) * window)
    return torch.stack(losses).mean()


def distillation_loss(
    predict: Predict, teacher: Predict | None, model: WorldModel, batch: Batch, rng: np.random.Generator, recipe: Recipe
) -> Tensor:
    """The loss of a few-step student, which is to predict in one pass where its teacher's flow ends.

    After a recorded context the student rolls out windows of its own; each is the context of the next (Huang et al.,
    Self Forcing, arXiv 2506.08009). In a window that it learns from, one of its sampler's passes, drawn at random, is
    compared with a target. With a teacher the target is where the teacher's flow leads from the same noisy window in
    the same context (regression on a teacher's trajectories: Yin et al., CausVid, arXiv 2412.07772, section 4.3). With
    `Recipe.recorded` it is the recording, unless the rollout goes straight on, which was not recorded. With
    `Recipe.agreement` a later chunk of the window's cycle, which knows its first frames, is also compared with what the
    first chunk predicted, in colour.
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
            if not where_recorded and rng.random() < 0.5:  # only the last chunk of a cycle knows all actions
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
    """A student's rollout: it generates windows, learns from them, and writes them as context."""

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
        return denoise(lambda level, noisy: self._predict(level, noisy, actions), noise, self.sigmas, known=())

    def learn(self, noise: Tensor, actions: Tensor, recorded: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next window, and the loss of one of its passes, drawn at random, against the recording or the teacher."""
        compared = int(self.rng.integers(len(self.sigmas)))
        predicted: list[Tensor] = []
        losses = []

        def step(level: int, noisy: Tensor) -> Tensor:
            clean = self._predict(level, noisy, actions, learned=level == compared)
            if level == compared and (recorded is not None or self.teacher is not None):
                target = recorded if recorded is not None else self._where_the_flow_ends(level, noisy, actions)
                losses.append(self._error(level, clean, target))
            predicted.append(clean.detach())
            return predicted[-1]

        window = denoise(step, noise, self.sigmas, known=())
        if self.recipe.agreement and window.shape[1] > 1 and len(self.sigmas) > 1:
            losses.append(self.recipe.agreement * self._departure(window, predicted, noise, actions))
        return window, torch.stack(losses).sum()

    def write(self, latents: Tensor, actions: Tensor, *, learned: bool) -> None:
        """Write a window as context of the next."""
        if self.teacher is not None:
            with torch.no_grad():
                self.teacher(latents, sigma=0.0, action_BFA=actions, history=self.teachers_history, write=True)
        with torch.set_grad_enabled(learned):
            self.predict(latents, sigma=0.0, action_BFA=actions, history=self.history, write=True)

    def stand(self, batch: Batch, latent_frames: int) -> None:
        """Tell both histories where the recordings were after this many latent frames."""
        for history in (self.history, self.teachers_history):
            if history.last is not None:
                batch.stand(history, latent_frames)

    def _predict(self, level: int, noisy: Tensor, actions: Tensor, *, learned: bool = False) -> Tensor:
        with torch.set_grad_enabled(learned):
            clean: Tensor = self.predict(noisy, sigma=self.sigmas[level], action_BFA=actions, history=self.history)
            return clean.float()

    def _error(self, level: int, clean: Tensor, target: Tensor, weight_N: Tensor | None = None) -> Tensor:
        sigma_B = torch.full((len(clean),), self.sigmas[level], device=clean.device)
        return error(clean, target, sigma_B, self.recipe, weight_N)

    @torch.no_grad()
    def _where_the_flow_ends(self, level: int, noisy: Tensor, actions: Tensor) -> Tensor:
        """The end of the teacher's Euler steps from a noisy window at one of the sampler's levels."""
        guidance, teacher = self.recipe.teacher_guidance, self.teacher
        assert teacher is not None

        def guided(sigma: float, x: Tensor) -> Tensor:
            told: Tensor = teacher(x, sigma=sigma, action_BFA=actions, history=self.teachers_history).float()
            if guidance == 1:
                return told
            untold = teacher(x, sigma=sigma, action_BFA=None, history=self.teachers_history).float()
            return torch.lerp(untold, told, guidance)

        remaining = 1 - level / len(self.sigmas)  # share of the flow, before the shift
        count = math.ceil(remaining * self.recipe.teacher_steps)
        steps = remaining * torch.linspace(1, 1 / count, count)
        return follow_flow(guided, noisy, shifted(steps, self.recipe.shift).tolist())

    def _departure(self, window: Tensor, predicted: list[Tensor], noise: Tensor, actions: Tensor) -> Tensor:
        """How far a pass of a later chunk, both drawn at random, departs from the same pass of the first chunk."""
        position, compared = int(self.rng.integers(1, window.shape[1])), int(self.rng.integers(1, len(self.sigmas)))
        losses = []

        def step(level: int, noisy: Tensor) -> Tensor:
            if level == 0:  # pure noise: the known frames do not show yet
                return predicted[0].clone()
            clean = self._predict(level, noisy, actions, learned=level == compared)
            if level == compared:
                later, first = clean[:, position:], predicted[level][:, position:]
                losses.append(self._error(level, later, first, self.is_colour_N))
            return clean.detach().clone()  # `denoise` writes the known frames into it

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

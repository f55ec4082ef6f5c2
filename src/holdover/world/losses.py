"""What a step of training minimises: flow matching on windows of recordings, or of the model's own making.

Lipman et al., arXiv 2210.02747; noisy latents are ``(1 - sigma) * clean + sigma * noise``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from holdover.world.kv_cache import KVCache
from holdover.world.recipe import Recipe
from holdover.world.sampler import denoise, follow_flow, shifted
from holdover.world.segments import Batch
from holdover.world.trainer import Predict
from holdover.world.transformer import WorldModel

#: Below it a clean prediction's error is not magnified further by making a velocity of it.
LEAST_SIGMA = 0.25


def hold_actions(actions_BFA: Tensor, known: int) -> Tensor:
    """What a driver has commanded by the time frame ``known`` is drawn: later frames hold that action."""
    return torch.cat(
        [actions_BFA[:, : known + 1], actions_BFA[:, known:][:, :1].expand_as(actions_BFA[:, known + 1 :])], 1
    )


def error(prediction: Tensor, target: Tensor, sigma_B: Tensor, recipe: Recipe) -> Tensor:
    """Flow matching's velocity error of a clean prediction, and an absolute error beside it."""
    difference = (prediction.float() - target) / sigma_B.clamp(min=LEAST_SIGMA)[:, None, None, None]
    return difference.square().mean() + recipe.l1 * difference.abs().mean()


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
    """The loss of one segment: chunk by chunk, context written by clean passes, one noisy pass on every target.

    Args:
        plain: chunks of one latent frame (and every chunk past the context is a target), else of a window.
        own: replace the contexts past the recorded one, and half of the noisy inputs, by what the model makes itself.
    """
    config, sigmas = model.sizes, recipe.sampler
    chunk = 1 if plain else config.window
    chunks = batch.latents.shape[1] // chunk
    first_target = config.context // chunk
    device = batch.latents.device
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))

    def noise_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, device=device)

    kv, losses = model.new_cache(), []
    for i in range(chunks):
        latents = batch.latents[:, i * chunk : (i + 1) * chunk]
        actions = batch.actions[:, i * chunk : (i + 1) * chunk]
        held = hold_actions(actions, int(rng.integers(chunk)))
        if i >= first_target:
            level = int(rng.integers(len(sigmas)))
            clean = latents
            if own and level and rng.random() < 0.5:
                known = latents[:, : int(rng.integers(chunk))]
                clean = _generate(predict, known, noise_like, latents, held, kv, sigmas[:level])
            sigma_B = torch.full((len(latents),), sigmas[level], device=device)
            if not recipe.levels and clean is latents:
                sigma_B = shifted(torch.rand(len(latents), generator=generator, device=device), recipe.shift)
            sigma = sigma_B[:, None, None, None]
            noisy = (1 - sigma) * clean + sigma * noise_like(latents)
            told = None if rng.random() < recipe.unconditional_share else held
            losses.append(error(predict(noisy, sigma=sigma_B, action_BFA=told, cache=kv), latents, sigma_B, recipe))
        if i == chunks - 1:
            break
        context = latents
        if own and i >= first_target:
            context = _generate(predict, latents[:, :0], noise_like, latents, actions, kv, sigmas)
        context = context + recipe.context_noise * rng.random() ** 2 * noise_like(context)
        shown = held if rng.random() < 0.5 else actions
        # The oldest context stays out of the backward pass, unless it is the only one: a sixth of a step saved.
        with torch.set_grad_enabled(i >= first_target or i == chunks - 2):
            predict(context, sigma=0.0, action_BFA=shown, cache=kv, write=True)
    return torch.stack(losses).mean()


def distillation_loss(
    predict: Predict, teacher: Predict, model: WorldModel, batch: Batch, rng: np.random.Generator, recipe: Recipe
) -> Tensor:
    """The loss of a few-step student: to say at once where its teacher's flow ends.

    After a recorded context it rolls out windows of its own, each the context of the next (Huang et al., Self Forcing,
    arXiv 2506.08009). In each of them one of its sampler's passes, a random one, is compared with where the teacher,
    whose context is the same, comes to by following the flow from the same noisy window (the regression on a teacher's
    trajectories of Yin et al., CausVid, arXiv 2412.07772, section 4.3).
    """
    sizes, sigmas = model.sizes, recipe.sampler
    generator = torch.Generator(batch.latents.device).manual_seed(int(rng.integers(2**62)))
    kv, teachers_kv = model.new_cache(), model.new_cache()

    def teacher_from(noisy: Tensor, level: int, actions: Tensor) -> Tensor:
        def guided(sigma: float, x: Tensor) -> Tensor:
            told: Tensor = teacher(x, sigma=sigma, action_BFA=actions, cache=teachers_kv).float()
            if recipe.teacher_guidance == 1:
                return told
            untold = teacher(x, sigma=sigma, action_BFA=None, cache=teachers_kv).float()
            return torch.lerp(untold, told, recipe.teacher_guidance)

        remaining = 1 - level / len(sigmas)  # of the way, before the shift
        count = math.ceil(remaining * recipe.teacher_steps)
        steps = remaining * torch.linspace(1, 1 / count, count)
        with torch.no_grad():
            return follow_flow(guided, noisy, shifted(steps, recipe.shift).tolist())

    def roll_out(noise: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The student's window, and the loss of one of its passes."""
        compared, losses = int(rng.integers(len(sigmas))), []

        def step(level: int, noisy: Tensor) -> Tensor:
            with torch.set_grad_enabled(level == compared):
                clean: Tensor = predict(noisy, sigma=sigmas[level], action_BFA=actions, cache=kv).float()
            if level == compared:
                sigma_B = torch.full((len(noisy),), sigmas[level], device=noisy.device)
                losses.append(error(clean, teacher_from(noisy, level, actions), sigma_B, recipe))
            return clean.detach()

        return denoise(step, noise, sigmas, known=()), losses[0]

    losses = []
    chunks = list(zip(batch.latents.split(sizes.window, 1), batch.actions.split(sizes.window, 1), strict=True))
    for i, (latents, actions) in enumerate(chunks):
        own = i * sizes.window >= sizes.context
        if own:
            if rng.random() < 0.5:  # in a cycle only the last generation knows all actions
                actions = hold_actions(actions, int(rng.integers(sizes.window)))
            noise = torch.randn((len(sigmas), *latents.shape), generator=generator, device=latents.device)
            latents, loss = roll_out(noise, actions)
            losses.append(loss)
        if i == len(chunks) - 1:
            break
        with torch.no_grad():
            teacher(latents, sigma=0.0, action_BFA=actions, cache=teachers_kv, write=True)
        with torch.set_grad_enabled((i + 1) * sizes.window >= sizes.context):
            predict(latents, sigma=0.0, action_BFA=actions, cache=kv, write=True)
    return torch.stack(losses).mean()


@torch.no_grad()
def _generate(
    predict: Predict,
    known: Tensor,
    noise_like: Callable[[Tensor], Tensor],
    latents: Tensor,
    actions: Tensor,
    kv: KVCache,
    sigmas: tuple[float, ...],
) -> Tensor:
    noise = torch.stack([noise_like(latents) for _ in sigmas])
    return denoise(lambda i, x: predict(x, sigma=sigmas[i], action_BFA=actions, cache=kv).float(), noise, sigmas, known)

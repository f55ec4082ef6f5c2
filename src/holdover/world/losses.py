"""What a step of training minimises: flow matching on recorded windows, or on rollouts of the model's own making."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from holdover.world.adversary import Discriminator, adversarial_gradient
from holdover.world.kv_cache import KVCache
from holdover.world.recipe import Recipe
from holdover.world.sampler import denoise, noise_levels
from holdover.world.segments import Batch
from holdover.world.transformer import WorldModel

Predict = Callable[..., Tensor]


def hold_actions(actions_BFA: Tensor, known: int) -> Tensor:
    """What a driver has commanded by the time frame ``known`` is drawn: later frames hold that action."""
    return torch.cat(
        [actions_BFA[:, : known + 1], actions_BFA[:, known:][:, :1].expand_as(actions_BFA[:, known + 1 :])], 1
    )


def error(prediction: Tensor, target: Tensor, sigma: float, recipe: Recipe) -> Tensor:
    """Flow matching's velocity error of a clean prediction, and an absolute error beside it."""
    difference = (prediction.float() - target) / sigma
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
        own: replace the contexts, and half of the noisy inputs, by what the model makes itself; the last chunk is
            then the only target.
    """
    config, sigmas = model.config, noise_levels(recipe.levels, recipe.shift)
    chunk = 1 if plain else config.window
    chunks = batch.latents.shape[1] // chunk
    first_target = config.context // chunk
    generator = torch.Generator(batch.latents.device).manual_seed(int(rng.integers(2**62)))

    def noise_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, device=x.device)

    kv, losses = model.new_cache(), []
    for i in range(chunks):
        latents = batch.latents[:, i * chunk : (i + 1) * chunk]
        actions = batch.actions[:, i * chunk : (i + 1) * chunk]
        held = hold_actions(actions, int(rng.integers(chunk)))
        if i >= first_target and (not own or i == chunks - 1):
            level = int(rng.integers(len(sigmas)))
            clean = latents
            if own and level and rng.random() < 0.5:
                known = latents[:, : int(rng.integers(chunk))]
                clean = _generate(predict, known, noise_like, latents, held, kv, sigmas[:level])
            sigma = sigmas[level]
            noisy = (1 - sigma) * clean + sigma * noise_like(latents)
            losses.append(error(predict(noisy, sigma=sigma, action_BFA=held, cache=kv), latents, sigma, recipe))
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


def rollout_loss(
    predict: Predict,
    model: WorldModel,
    batch: Batch,
    rng: np.random.Generator,
    recipe: Recipe,
    judge: Discriminator,
    *,
    plain: bool,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A rollout from recorded context, every later chunk of which is generated from those before it.

    In each chunk the sampler stops after a random pass; in the last chunks that one carries the gradient. What it
    predicts is the context of the next chunk. A fifth of those chunks is continued as in the window cadence: their
    first latent frames are known, from a generation of the same chunk before.

    Returns:
        A loss with the gradient of regression and adversary, the regression's value, and what was generated.
    """
    config, sigmas = model.config, noise_levels(recipe.levels, recipe.shift)
    chunk = 1 if plain else config.window
    generator = torch.Generator(batch.latents.device).manual_seed(int(rng.integers(2**62)))

    def noise_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, device=x.device)

    kv = model.new_cache()
    with torch.no_grad():
        for latents, actions in zip(
            batch.latents[:, : config.context].split(chunk, 1), batch.actions.split(chunk, 1), strict=False
        ):
            context = latents + recipe.context_noise * rng.random() ** 2 * noise_like(latents)
            predict(context, sigma=0.0, action_BFA=actions, cache=kv, write=True)
    surrogate, values, generated = torch.zeros((), device=batch.latents.device), [], []
    through_context = bool(rng.random() < 0.5)
    chunks = list(
        zip(
            batch.latents[:, config.context :].split(chunk, 1),
            batch.actions[:, config.context :].split(chunk, 1),
            strict=True,
        )
    )
    for i, (latents, actions) in enumerate(chunks):
        graded = plain or i >= len(chunks) - recipe.graded
        held = hold_actions(actions, int(rng.integers(chunk)))
        known, committed = latents[:, :0], None
        if graded and not plain and rng.random() < 0.2:
            committed = _generate(predict, known, noise_like, latents, held, kv, sigmas)
            known = committed[:, : int(rng.integers(1, chunk))]
        level = int(rng.integers(len(sigmas)))
        noisy = noise_like(latents)
        if level:
            clean = _generate(predict, known, noise_like, latents, held, kv, sigmas[:level])
            noisy = (1 - sigmas[level]) * clean + sigmas[level] * noisy
        with torch.set_grad_enabled(graded):
            prediction = predict(noisy, sigma=sigmas[level], action_BFA=held, cache=kv).float()
        if graded:
            leaf = prediction.detach().requires_grad_(True)
            value = error(leaf, latents, sigmas[level], recipe)
            (pull,) = torch.autograd.grad(value, leaf)
            push = adversarial_gradient(judge, prediction, latents, pull, weight)
            surrogate = surrogate + (prediction * (pull + push)).sum()
            values.append(value.detach())
        generated.append(prediction.detach())
        committed = prediction.detach() if committed is None else committed
        shown = held if rng.random() < 0.5 else actions
        with torch.set_grad_enabled(graded and through_context):
            predict(committed, sigma=0.0, action_BFA=shown, cache=kv, write=True)
    return surrogate / len(values), torch.stack(values).mean(), torch.cat(generated, 1)


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

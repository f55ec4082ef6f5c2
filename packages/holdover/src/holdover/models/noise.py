"""The noise level σ of a pass, as a tensor that goes with the latents: see `holdover.slot.Prediction`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from holdover.slot import Prediction


def of_timestep(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Of a model that is told ``timestep``, which is ``1000·σ``."""
    told = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return per_thousand(told["hidden_states"], told["timestep"])


def of_t(model: nn.Module, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of the Self-Forcing family: ``t`` is ``1000·σ`` of each latent frame."""
    return per_thousand(x, t)


def per_thousand(latents: Tensor, timestep: Tensor) -> Tensor:
    """σ for latents ``[B, C, F, H, W]`` or ``[B, L, C]`` from timesteps ``[B]``, ``[B, F]`` or ``[B, L]``.

    Raises:
        ValueError: the timesteps are of something else.
    """
    frames = latents.shape[2] if latents.dim() == 5 else latents.shape[1]
    sigma = timestep.float() / 1000
    if sigma.dim() < 2:
        return sigma.expand(len(latents)).reshape(-1, *[1] * (latents.dim() - 1))
    if sigma.shape != (len(latents), frames):
        raise ValueError(
            f"timesteps {list(timestep.shape)} do not say the noise level of latents {list(latents.shape)}; say "
            f"step(sigma=...)"
        )
    return sigma[:, None, :, None, None] if latents.dim() == 5 else sigma[..., None]


def of_scheduler(scheduler: Any, index: int, prediction: Prediction | None) -> float | Tensor | None:
    """σ of a scheduler's step, in the terms of what the model returns; None where the scheduler does not say."""
    if prediction in ("noise", "v"):
        kept, timesteps = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "timesteps", None)
        if kept is None or timesteps is None or index >= len(timesteps):
            return None
        sigma: Tensor = (1 - kept[int(timesteps[index])]).sqrt()
        return sigma
    sigmas = getattr(scheduler, "sigmas", None)
    return sigmas[index] if sigmas is not None and index < len(sigmas) else None

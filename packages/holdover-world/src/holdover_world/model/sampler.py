"""Sampling of one window: shifted flow-matching noise levels, with the known frames noised again at each level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

Sampler = Literal["renoise", "euler"]


def noise_levels(steps: int, shift: float) -> tuple[float, ...]:
    """The ``steps`` noise levels of a pass, from 1 downwards: ``shift*s / (1 + (shift-1)*s)`` over uniform ``s``.

    Source: the timestep shift of SD3 (Esser et al., arXiv 2403.03206, eq. 23).
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"steps={steps} must be at least 1 and shift={shift} positive")
    return tuple(shifted(torch.linspace(1, 1 / steps, steps, dtype=torch.float64), shift).tolist())


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Noise levels from values spread evenly over [0, 1]."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def denoise(
    predict: Callable[[int, Tensor], Tensor],
    noise_SBFNP: Tensor,
    sigmas: Sequence[float],
    known: Iterable[Tensor],
    *,
    sampler: Sampler = "renoise",
) -> Tensor:
    """Denoise one window whose first latent frames are known.

    At each level the sample is ``(1 - sigma)*clean + sigma*noise``. ``clean`` is the last prediction, with the known
    latents put in their place. ``renoise`` takes a new noise at every level, as few-step models do (consistency
    sampling, Song et al., arXiv 2303.01469, algorithm 1). ``euler`` takes the noise that the last prediction implies,
    which is Euler's step along the flow, for models of many steps.

    Args:
        predict: maps (step, noisy window) to predicted clean latents.
        noise_SBFNP: Gaussian noise, one draw per step; ``euler`` uses the first.
        sigmas: noise levels; the first is 1.
        known: per row of the batch the first latents of the window ``[f, N, P]``; rows may differ in f, which may be 0.

    Returns:
        The clean window ``[B, F, N, P]``, which begins with the known frames.
    """
    rows = list(known)
    clean = _put(rows, torch.zeros_like(noise_SBFNP[0]))
    noise = noise_SBFNP[0]
    for i, sigma in enumerate(sigmas):
        if sampler == "renoise":
            noise = noise_SBFNP[i]
        noisy = (1 - sigma) * clean + sigma * noise
        clean = predict(i, noisy).to(noise.dtype)
        if sampler == "euler":
            noise = _put(
                [first[: len(each)] for first, each in zip(noise_SBFNP[0], rows, strict=False)],
                (noisy - (1 - sigma) * clean) / sigma,
            )
        clean = _put(rows, clean)
    return clean


def follow_flow(predict: Callable[[float, Tensor], Tensor], noisy: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Clean latents that Euler's steps along the flow reach from a noisy sample at the first of these levels.

    Args:
        predict: maps (noise level, noisy latents) to predicted clean latents.
    """
    clean = noisy
    for sigma, following in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
        clean = predict(sigma, noisy)
        noisy = clean + following / sigma * (noisy - clean)
    return clean


def _put(rows: Sequence[Tensor], clean_BFNP: Tensor) -> Tensor:
    """Write the known frames into their place."""
    for n, known in enumerate(rows):
        clean_BFNP[n, : len(known)] = known
    return clean_BFNP

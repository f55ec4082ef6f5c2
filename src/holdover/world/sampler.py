"""Few-step sampling of one window: shifted flow-matching noise levels, and the known part re-noised at each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def noise_levels(steps: int, shift: float) -> tuple[float, ...]:
    """The ``steps`` noise levels of a pass, from 1 downwards: ``shift*s / (1 + (shift-1)*s)`` over uniform ``s``.

    Source: the timestep shift of SD3 (Esser et al., arXiv 2403.03206, eq. 23).
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"steps={steps} must be at least 1 and shift={shift} positive")
    return tuple(shifted(torch.linspace(1, 1 / steps, steps, dtype=torch.float64), shift).tolist())


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Noise levels from values that are spread evenly over [0, 1]."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def denoise(
    predict: Callable[[int, Tensor], Tensor], noise_SBFNP: Tensor, sigmas: Sequence[float], known: Iterable[Tensor]
) -> Tensor:
    """Denoise one window whose first latent frames are known already.

    At each level the sample is ``(1 - sigma)*clean + sigma*noise[step]``, where ``clean`` is the last prediction, and
    the known latents in their place (METHODS: the window cadence).

    Args:
        predict: maps (step, noisy window) to predicted clean latents.
        noise_SBFNP: one draw of Gaussian noise per step.
        sigmas: noise levels, the first 1.
        known: per row of the batch the latents of the window's first frames ``[f, N, P]``: rows may differ in how many,
            and have none.

    Returns:
        The clean window ``[B, F, N, P]``, its first frames the known ones.
    """
    rows = list(known)
    clean = _put(rows, torch.zeros_like(noise_SBFNP[0]))
    for i, sigma in enumerate(sigmas):
        clean = _put(rows, predict(i, (1 - sigma) * clean + sigma * noise_SBFNP[i]).to(noise_SBFNP.dtype))
    return clean


def _put(rows: Sequence[Tensor], clean_BFNP: Tensor) -> Tensor:
    """Write what is known into its place."""
    for n, known in enumerate(rows):
        clean_BFNP[n, : len(known)] = known
    return clean_BFNP

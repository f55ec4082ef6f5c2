"""Features of noise levels, actions and the places of tokens, for the small networks of the world model.

Shape suffixes: B batch, F latent frames, N tokens of one latent frame, A dimensions of the action.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from holdover_world.config import WorldConfig, token_rays

#: R, values of `ray_features`.
RAY_FEATURES = 32


def neighbourhoods(config: WorldConfig) -> Tensor:
    """The nine tokens around each token in its camera, itself included, ``[N, 9]``; N stands for none."""
    index = []
    for plane in config.planes:
        grid = torch.arange(plane.tokens.start, plane.tokens.stop).view(plane.rows, plane.columns)
        padded = F.pad(grid, (1, 1, 1, 1), value=config.tokens)
        index.append(padded.unfold(0, 3, 1).unfold(1, 3, 1).reshape(-1, 9))
    return torch.cat(index)


def ray_features(config: WorldConfig) -> Tensor:
    """The ray through each token: direction, its Fourier features, position of the camera, modality; ``[N, R]``."""
    rays = torch.tensor(token_rays(config))  # on the device of the model that is being built
    octaves = math.pi * 2.0 ** torch.arange(4, dtype=rays.dtype)  # the default dtype differs while weights are read
    angles = (rays[:, :3, None] * octaves).flatten(1)
    modality = [
        torch.full((len(range(*plane.tokens.indices(config.tokens))),), config.modalities.index(plane.modality))
        for plane in config.planes
    ]
    return torch.cat([rays, angles.sin(), angles.cos(), F.one_hot(torch.cat(modality), 2)], 1)


def sigma_features(sigma_B: Tensor) -> Tensor:
    """Sinusoidal features ``[B, 128]`` of a noise level in [0, 1]."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), 64, device=sigma_B.device))
    angles = sigma_B[:, None] * frequencies * math.pi
    return torch.cat([angles.cos(), angles.sin()], 1)


def action_features(action_BFA: Tensor) -> Tensor:
    """The symmetric logarithm of the action, and its Fourier features at eight octaves, ``[B, F, 17*A]``."""
    action = action_BFA.sign() * action_BFA.abs().log1p()
    octaves = math.pi * 2.0 ** torch.arange(-1, 7, device=action_BFA.device)
    angles = (action[..., None] * octaves).flatten(-2)
    return torch.cat([action, angles.sin(), angles.cos()], -1)

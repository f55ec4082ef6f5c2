"""Video to latents and back: a latent frame packs a few video frames into patches of pixels.

Shape suffixes: B batch, F latent frames, N tokens of one latent frame (in the order group, view, h, w), P values of a
patch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from holdover.world.config import WorldConfig


def patchify(frames: Mapping[str, Tensor], config: WorldConfig) -> Tensor:
    """Turn video into latents.

    Args:
        frames: per camera ``uint8 [B, T, height, width, 3]``, T a multiple of ``frames_per_latent``.

    Returns:
        ``float32 [B, F, N, P]`` in [-1, 1].
    """
    p, t = config.patch, config.frames_per_latent
    parts = []
    for camera in (camera for group in config.groups for camera in group):
        if camera.name not in frames:
            raise ValueError(f"camera {camera.name!r} is missing; frames holds {sorted(frames)}")
        video = frames[camera.name]
        if video.shape[1] % t:
            raise ValueError(f"{video.shape[1]} frames of {camera.name} are not a multiple of {t}")
        rows, columns = config.grid(camera)
        x = video.reshape(video.shape[0], -1, t, rows, p, columns, p, 3).permute(0, 1, 3, 5, 2, 4, 6, 7)
        parts.append(x.reshape(*x.shape[:2], rows * columns, -1))
    return torch.cat(parts, 2).float() / 127.5 - 1


def to_video(x_BFNP: Tensor, config: WorldConfig) -> dict[str, Tensor]:
    """Latents as video, differentiable and unbounded: per camera ``[B, T, height, width, 3]``, nominally in [-1, 1]."""
    p, t = config.patch, config.frames_per_latent
    frames, start = {}, 0
    for camera in (camera for group in config.groups for camera in group):
        rows, columns = config.grid(camera)
        part = x_BFNP[:, :, start : start + rows * columns].reshape(*x_BFNP.shape[:2], rows, columns, t, p, p, 3)
        part = part.permute(0, 1, 4, 2, 5, 3, 6, 7)
        frames[camera.name] = part.reshape(x_BFNP.shape[0], -1, camera.height, camera.width, 3)
        start += rows * columns
    return frames


def unpatchify(x_BFNP: Tensor, config: WorldConfig) -> dict[str, Tensor]:
    """The inverse of `patchify`, rounded and clipped to uint8."""
    return to_video(((x_BFNP.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), config)

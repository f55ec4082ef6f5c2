"""A world model and clips small enough for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from holdover.world.cameras import Camera
from holdover.world.config import WorldConfig
from holdover.world.transformer import WorldModel

CAMERAS = (
    Camera(name="front_wide", group="front", width=32, height=16, fov=100, yaw=0, pitch=4, position=(2, 0, 1.5)),
    Camera(name="front_narrow", group="front", width=32, height=16, fov=50, yaw=0, pitch=1, position=(2, 0, 1.5)),
    Camera(name="rear", group="rear", width=16, height=8, fov=90, yaw=180, pitch=4, position=(-1, 0, 1.4)),
)


def small_config(**changes: int) -> WorldConfig:
    fields = {"channels": 32, "depth": 4, "heads": 2, "window": 2, "context": 4, "frames_per_latent": 2, **changes}
    return WorldConfig(cameras=CAMERAS, **fields)


def small_model(seed: int = 0, **changes: int) -> WorldModel:
    """A seeded model in float32 whose every layer matters (a fresh one predicts zeros)."""
    torch.manual_seed(seed)
    model = WorldModel.of(small_config(**changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


def latents(model: WorldModel, frames: int, *, seed: int = 0, batch: int = 1) -> Tensor:
    shape = batch, frames, model.sizes.tokens, model.sizes.patch_values
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.5

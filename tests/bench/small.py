"""A world model and clips just large enough for every metric."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from holdover.world.cameras import Camera
from holdover.world.clips import ClipWriter, open_dataset
from holdover.world.config import WorldConfig
from holdover.world.transformer import WorldModel

CAMERAS = (
    Camera(name="front_wide", group="front", width=32, height=24, fov=100, yaw=0, pitch=4, position=(2, 0, 1.5)),
    Camera(name="rear", group="rear", width=24, height=24, fov=90, yaw=180, pitch=4, position=(-1, 0, 1.4)),
)


def world_model(seed: int = 0) -> WorldModel:
    """A seeded model in float32 whose every layer matters, with windows of four latent frames."""
    torch.manual_seed(seed)
    model = WorldModel.of(
        WorldConfig(channels=32, depth=4, heads=2, window=4, context=4, frames_per_latent=2, cameras=CAMERAS)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    return model.eval().requires_grad_(False)


def write_clips(folder: Path, frames: int) -> Path:
    """One clip of moving stripes for each scenario; the car drives 8 m/s and more and turns a little."""
    open_dataset(folder, CAMERAS)
    for scenario in ("urban", "highway", "uturn"):
        with ClipWriter(folder, scenario, 0, cameras=CAMERAS, depth=False) as writer:
            for k in range(frames):
                rgb = {}
                for i, camera in enumerate(CAMERAS):
                    y, x = np.mgrid[: camera.height, : camera.width]
                    stripes = 128 + 90 * np.sin((x + 2 * k) / 5 + i), 100 + 2 * y, 128 + 60 * np.cos((y - k) / 4)
                    rgb[camera.name] = np.stack(stripes, -1).astype(np.uint8)
                command = 9 + math.sin(k / 20), 0.02 * math.sin(k / 15)
                writer.add(rgb, None, command=command, motion=command, pose=(0.0, 0.0, 0.0))
            writer.finish()
    return folder

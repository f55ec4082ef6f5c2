"""A world model and clips just large enough to drive and to measure."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import Camera
from holdover_world.scene.clips import ClipWriter, open_dataset
from tests.holdover_world.small import small_config, small_model

CAMERAS = (
    Camera(name="front_wide", group="front", width=48, height=32, fov=100, yaw=0, pitch=4, position=(2, 0, 1.5)),
    Camera(name="rear", group="rear", width=32, height=32, fov=90, yaw=180, pitch=4, position=(-1, 0, 1.4)),
)


def world_model(seed: int = 0) -> WorldModel:
    """A seeded float32 model with windows of four latent frames; no weight is zero."""
    return small_model(seed, sizes=small_config(cameras=CAMERAS, window=4))


def write_clips(folder: Path, frames: int, *, depth: bool = True, cameras: tuple[Camera, ...] = CAMERAS) -> Path:
    """A clip of moving stripes over flat ground for each scenario. The car drives at 8 m/s or more and turns."""
    open_dataset(folder, cameras)
    for scenario in ("urban", "highway", "uturn"):
        with ClipWriter(folder, scenario, 0, cameras=cameras, depth=depth) as writer:
            for k in range(frames):
                rgb, metres = {}, {}
                for i, camera in enumerate(cameras):
                    y, x = np.mgrid[: camera.height, : camera.width]
                    stripes = 128 + 90 * np.sin((x + 2 * k) / 5 + i), 100 + 2 * y, 128 + 60 * np.cos((y - k) / 4)
                    rgb[camera.name] = np.stack(stripes, -1).astype(np.uint8)
                    metres[camera.name] = np.where(y > 12, 60 / np.maximum(y - 12, 1), 655.35).astype(np.float32)
                command = 9 + math.sin(k / 40), 0.02 * math.sin(k / 30)
                writer.add(rgb, metres if depth else None, command=command, motion=command, pose=(0.0, 0.0, 0.0))
            writer.finish()
    return folder

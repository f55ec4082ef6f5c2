"""A world model and clips just large enough for every metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import Camera
from holdover_world.scene.clips import ClipWriter, open_dataset
from tests.holdover_world.small import small_config, small_model

CAMERAS = (
    Camera(name="front_wide", group="front", width=48, height=32, fov=100, yaw=0, pitch=4, position=(2, 0, 1.5)),
    Camera(name="rear", group="rear", width=32, height=32, fov=90, yaw=180, pitch=4, position=(-1, 0, 1.4)),
)


def world_model(seed: int = 0) -> WorldModel:
    """A seeded model in float32 whose every layer matters, with windows of four latent frames."""
    return small_model(seed, sizes=small_config(cameras=CAMERAS, window=4))


def write_clips(folder: Path, frames: int, *, depth: bool = True, cameras: tuple[Camera, ...] = CAMERAS) -> Path:
    """A clip of moving stripes over flat ground for each scenario; the car drives 8 m/s and more and turns a little."""
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


def cut_off_before_the_card(
    bench: ModuleType, run: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The figures of a bench that was cut off before it wrote its card, and then went on without driving again."""

    def cut_off(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench, "write_card", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run()
    with monkeypatch.context() as patch:
        patch.setattr(bench, "Race", cut_off)
        return run()

"""A world model and clips small enough for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from holdover_world.codec.autoencoder import Autoencoder
from holdover_world.codec.latents import Codec
from holdover_world.config import WorldConfig
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import Camera
from holdover_world.scene.clips import ClipWriter, open_dataset
from holdover_world.scene.layout import Layout

#: Their tokens of depth, 32 pixels wide, all reach beyond the edge.
CAMERAS = (
    Camera(name="front_wide", group="front", width=48, height=32, fov=100, yaw=0, pitch=4, position=(2, 0, 1.5)),
    Camera(name="front_narrow", group="front", width=48, height=32, fov=50, yaw=0, pitch=1, position=(2, 0, 1.5)),
    Camera(name="rear", group="rear", width=16, height=16, fov=90, yaw=180, pitch=4, position=(-1, 0, 1.4)),
)


def small_config(*, cameras: tuple[Camera, ...] = CAMERAS, **changes: int) -> WorldConfig:
    fields = {
        "channels": 32,
        "layers": 4,
        "heads": 2,
        "latent_channels": 4,
        "depth_channels": 1,
        "window": 2,
        "context": 4,
        **changes,
    }
    return WorldConfig(cameras=cameras, **fields)


def small_model(seed: int = 0, *, sizes: WorldConfig | None = None, **changes: int) -> WorldModel:
    """A seeded model in float32 whose every layer matters (a fresh one predicts zeros), with a codec."""
    sizes = sizes or small_config(**changes)
    codec = small_codec(sizes, seed)
    torch.manual_seed(seed)
    model = WorldModel.of(sizes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    model.codec = codec
    return model.eval().requires_grad_(False)


def small_codec(sizes: WorldConfig, seed: int = 0) -> Codec:
    """Seeded autoencoders in float32 whose every layer and buffer matters."""
    torch.manual_seed(seed)
    autoencoders = {"colour": small_autoencoder(3, sizes.latent_channels)}
    if sizes.depth_channels:
        autoencoders["depth"] = small_autoencoder(1, sizes.depth_channels)
    return Codec(sizes, autoencoders)


def small_autoencoder(colours: int, latent_channels: int) -> Autoencoder:
    model = Autoencoder(
        colours=colours, latent_channels=latent_channels, widths=(8, 16), encoder_blocks=1, decoder_blocks=1
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    nn.init.normal_(model.centre_Q, std=0.1)
    model.basis_QZ.copy_(torch.linalg.qr(torch.randn_like(model.basis_QZ))[0])
    model.deviation_Z.fill_(10)
    nn.init.normal_(model.mean_Z, std=0.1)
    nn.init.uniform_(model.std_Z, 0.5, 1.5)
    return model.eval().requires_grad_(False)


def latents(model: WorldModel, frames: int, *, seed: int = 0, batch: int = 1) -> Tensor:
    shape = batch, frames, model.sizes.tokens, model.sizes.patch_values
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def small_layout(boxes: Tensor | None = None, cars: int = 1, frames: int = 40) -> Layout:
    """A plain of grass with a square of asphalt, boxes on it, and cars that drive along y and turn."""
    ground = torch.zeros(400, 400, dtype=torch.uint8)
    ground[100:300, 100:300] = 1
    parts = torch.tensor([[n, 0.5, 0.0, 2.2, 0.9, 0.2, 1.5, 0.8, 0.1, 0.1] for n in range(cars)]).view(-1, 10)
    time = torch.arange(frames).float()
    poses = torch.stack([6.0 + 0 * time, -4 + 0.3 * time, 0.4 + 0.02 * time], -1)
    poses = torch.stack([poses + torch.tensor([5.0 * n, 0.0, 0.0]) for n in range(cars)], 1)
    return Layout(
        ground_GH=ground,
        corner_2=torch.tensor([-40.0, -40.0]),
        boxes_M10=torch.zeros(0, 10) if boxes is None else boxes,
        parts_J10=parts,
        poses_TC3=poses,
    )


def write_clip(folder: Path, seed: int, frames: int, *, depth: bool = True, drives: bool = True) -> Path:
    """A clip of moving stripes over a road whose depth grows upwards. The car drives faster and faster, or stands."""
    open_dataset(folder, CAMERAS)
    with ClipWriter(folder, "urban", seed, cameras=CAMERAS, depth=depth) as writer:
        for k in range(frames):
            rgb, metres = {}, {}
            for i, camera in enumerate(CAMERAS):
                y, x = np.mgrid[: camera.height, : camera.width]
                stripes = 128 + 90 * np.sin((x + 2 * k + seed) / 5 + i), 100 + 2 * y, 128 + 60 * np.cos((y - k) / 4)
                rgb[camera.name] = np.stack(stripes, -1).astype(np.uint8)
                metres[camera.name] = (60 / (1 + y) + 5 + 3 * np.sin(k / 3 + x / 9)).astype(np.float32)
            command = (5 + k // 4, 0.01) if drives else (0, 0)  # a command holds for a latent frame
            writer.add(rgb, metres if depth else None, command=command, motion=command, pose=(k, 0.0, 0.0))
        return writer.finish()

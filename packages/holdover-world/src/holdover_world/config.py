"""The sizes of a world model, and the layout of its tokens that follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdover.slot import ViewGroup
from holdover_world.scene.cameras import RIG, Camera, camera_rays, enlarged
from holdover_world.scene.clips import read_cameras

FRAMES = 4  # video frames of a latent frame
SCALE = 8  # pixels of a latent, each way


@dataclass(frozen=True)
class Plane:
    """The tokens of one camera in one modality: a grid, and its start among the N tokens of a latent frame."""

    camera: Camera
    modality: str
    rows: int
    columns: int
    start: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.rows * self.columns)


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Sizes of a world model. The defaults are those of the trained models.

    Attributes:
        channels, layers, heads, mlp_ratio: sizes of the transformer.
        latent_channels, patch: in colour, channels of a latent, and latents of a token, each way.
        depth_channels, depth_patch: the same in depth, whose tokens are coarser. No channels mean no depth.
        window: latent frames denoised together.
        context: latent frames in the KV cache, a multiple of the window.
        action_dims: dimensions of the action.
        cameras: the rig.
    """

    channels: int = 256
    layers: int = 30
    heads: int = 4
    mlp_ratio: int = 4
    latent_channels: int = 48
    patch: int = 2
    depth_channels: int = 12
    depth_patch: int = 4
    window: int = 4
    context: int = 4
    action_dims: int = 2
    cameras: tuple[Camera, ...] = field(default=RIG)

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            raise ValueError(f"channels={self.channels} must be a multiple of heads={self.heads}")
        if self.channels // self.heads % 8:
            raise ValueError(
                f"channels / heads = {self.channels // self.heads} must be a multiple of 8, for rotary axes"
            )
        if self.context % self.window:
            raise ValueError(f"context={self.context} must hold whole windows of {self.window} latent frames")
        if self.depth_channels and self.depth_channels * self.depth_patch**2 != self.patch_values:
            raise ValueError(
                f"a token of depth has {self.depth_channels} * {self.depth_patch}**2 values, a token of colour "
                f"{self.patch_values}; make them equal"
            )
        if not self.cameras:
            raise ValueError("cameras is empty; give at least one")
        for group in self.groups:
            if len({(camera.width, camera.height) for camera in group}) > 1:
                sizes = ", ".join(f"{camera.name} {camera.width}x{camera.height}" for camera in group)
                raise ValueError(f"the cameras of group {group[0].group!r} differ in size ({sizes}); split it")
        for camera in self.cameras:
            size = self.patch * SCALE
            if camera.width % size or camera.height % size:
                raise ValueError(
                    f"camera {camera.name} is {camera.width}x{camera.height}; give multiples of {size} pixels, the "
                    "side of a token"
                )

    @property
    def frames_per_latent(self) -> int:
        return FRAMES

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("colour", "depth") if self.depth_channels else ("colour",)

    @cached_property
    def groups(self) -> tuple[tuple[Camera, ...], ...]:
        """The cameras by view group, groups in the order of their first camera."""
        names = list(dict.fromkeys(camera.group for camera in self.cameras))
        return tuple(tuple(c for c in self.cameras if c.group == name) for name in names)

    def grid(self, camera: Camera, modality: str = "colour") -> tuple[int, int]:
        """Rows and columns of tokens of a camera. At the lower and right edges a token may reach beyond the picture."""
        size = SCALE * self.token_latents(modality)
        return math.ceil(camera.height / size), math.ceil(camera.width / size)

    def token_latents(self, modality: str) -> int:
        """Latents of a token, each way."""
        return self.patch if modality == "colour" else self.depth_patch

    @cached_property
    def view_groups(self) -> tuple[ViewGroup, ...]:
        """The layout of the tokens: the groups of cameras in colour, then the same groups in depth."""
        return tuple(
            ViewGroup(group[0].group if m == "colour" else f"{group[0].group}.{m}", len(group), *self.grid(group[0], m))
            for m in self.modalities
            for group in self.groups
        )

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """Each camera in each modality, in the order of their tokens."""
        planes: list[Plane] = []
        for modality in self.modalities:
            for camera in (camera for group in self.groups for camera in group):
                start = planes[-1].tokens.stop if planes else 0
                planes.append(Plane(camera, modality, *self.grid(camera, modality), start))
        return tuple(planes)

    @cached_property
    def tokens(self) -> int:
        """N, tokens of one latent frame."""
        last = self.planes[-1]
        return last.start + last.rows * last.columns

    @property
    def patch_values(self) -> int:
        """P, values of one token."""
        return self.latent_channels * self.patch**2

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        cameras = [{**asdict(camera), "position": list(camera.position)} for camera in self.cameras]
        return {**asdict(self), "cameras": cameras}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> WorldConfig:
        """The reverse of `to_dict`."""
        cameras = tuple(Camera(**{**c, "position": tuple(c["position"])}) for c in fields["cameras"])
        return cls(**{**fields, "cameras": cameras})


#: Sizes by name. `small` is that of the trained models. `xworld-5b` has the layers and tokens of X-World, whose cameras
#: are eight times as wide, and about its five billion weights. `base` and `xworld-5b` were never trained; they serve to
#: measure time.
CONFIGS: Mapping[str, WorldConfig] = {
    "tiny": WorldConfig(channels=64, layers=12, heads=2),
    "small": WorldConfig(),
    "base": WorldConfig(channels=768, heads=12),
    "xworld-5b": WorldConfig(channels=3072, heads=24, mlp_ratio=6, cameras=enlarged(RIG, 8)),
}


def config_for(size: str, folder: Path, *, cameras: Sequence[str] | None = None, depth: bool = True) -> WorldConfig:
    """A named size for the cameras of a folder of clips.

    Args:
        size: a key of `CONFIGS`.
        cameras: names of the cameras to use; by default all.
        depth: whether the model has depth.

    Raises:
        ValueError: the folder has no camera of such a name.
    """
    recorded = {camera.name: camera for camera in read_cameras(folder)}
    for name in cameras or ():
        if name not in recorded:
            raise ValueError(f"camera {name!r} is not one of {', '.join(recorded)}, those of {folder}")
    chosen = tuple(camera for name, camera in recorded.items() if not cameras or name in cameras)
    sizes = replace(CONFIGS[size], cameras=chosen)
    return sizes if depth else replace(sizes, depth_channels=0)


def token_rays(config: WorldConfig) -> NDArray[np.float32]:
    """The ray through the centre of each token: unit direction and position of the camera, ``[N, 6]``."""
    rays = []
    for plane in config.planes:
        direction = camera_rays(plane.camera, every=SCALE * config.token_latents(plane.modality)).reshape(-1, 3)
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        rays.append(np.concatenate([direction, np.broadcast_to(plane.camera.position, direction.shape)], 1))
    return np.concatenate(rays).astype(np.float32)

"""The sizes of a world model, and the geometry that follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from holdover.engine.slots import ViewGroup
from holdover.world.cameras import RIG, Camera


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Sizes of a world model. The defaults are those of the shipped checkpoint."""

    channels: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: int = 4
    patch: int = 8
    frames_per_latent: int = 4
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
        for camera in self.cameras:
            if camera.width % self.patch or camera.height % self.patch:
                size = f"{camera.width}x{camera.height}"
                raise ValueError(f"camera {camera.name} is {size}, not a multiple of patch={self.patch}")

    @property
    def groups(self) -> tuple[tuple[Camera, ...], ...]:
        """The cameras by view group, groups in the order of their first camera."""
        names = list(dict.fromkeys(camera.group for camera in self.cameras))
        return tuple(tuple(c for c in self.cameras if c.group == name) for name in names)

    def grid(self, camera: Camera) -> tuple[int, int]:
        """Rows and columns of patches in one frame of a camera."""
        return camera.height // self.patch, camera.width // self.patch

    @property
    def view_groups(self) -> tuple[ViewGroup, ...]:
        return tuple(
            ViewGroup(group[0].group, len(group), *self.grid(group[0]))  # every camera of a group has one size
            for group in self.groups
        )

    @property
    def tokens(self) -> int:
        """N, tokens of one latent frame."""
        return sum(math.prod(self.grid(camera)) for camera in self.cameras)

    @property
    def patch_values(self) -> int:
        """P, values of one patch."""
        return 3 * self.frames_per_latent * self.patch**2

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorldConfig:
        fields = json.loads(text)
        cameras = tuple(Camera(**{**c, "position": tuple(c["position"])}) for c in fields.pop("cameras"))
        return cls(cameras=cameras, **fields)


#: Sizes by name. `small` is the shipped checkpoint's. `xworld-5b` has X-World's number of blocks and of tokens (one for
#: 16 by 16 pixels of its cameras, which are eight times as wide) and about its five billion weights. `base` and
#: `xworld-5b` have never been trained; they are there to be timed.
CONFIGS: Mapping[str, WorldConfig] = {
    "tiny": WorldConfig(channels=64, depth=12, heads=2, patch=16),
    "small": WorldConfig(),
    "base": WorldConfig(channels=768, depth=30, heads=12, patch=4),
    "xworld-5b": WorldConfig(channels=3072, depth=30, heads=24, mlp_ratio=6, patch=2),
}


def camera_rays(camera: Camera, *, every: int = 1) -> NDArray[np.float64]:
    """Directions in ego coordinates through the centre of each square of ``every`` pixels: ``[rows, columns, 3]``.

    They have length 1 along the viewing axis, not in all.
    """
    focal = camera.width / 2 / math.tan(math.radians(camera.fov) / 2)
    right = (np.arange(camera.width // every) + 0.5) * every - camera.width / 2
    down = (np.arange(camera.height // every) + 0.5) * every - camera.height / 2
    v, u = np.meshgrid(down / focal, right / focal, indexing="ij")
    pitch, yaw = math.radians(camera.pitch), math.radians(camera.yaw)
    forward = math.cos(pitch) - v * math.sin(pitch)
    up = -math.sin(pitch) - v * math.cos(pitch)
    x = forward * math.cos(yaw) + u * math.sin(yaw)
    y = forward * math.sin(yaw) - u * math.cos(yaw)
    return np.stack([x, y, up], -1)


def ray_directions(config: WorldConfig) -> NDArray[np.float32]:
    """Azimuth and elevation in radians, ego coordinates, through the centre of each patch: ``[N, 2]``."""
    directions = []
    for camera in (camera for group in config.groups for camera in group):
        x, y, up = np.moveaxis(camera_rays(camera, every=config.patch), -1, 0)
        directions.append(np.stack([np.arctan2(y, x), np.arctan2(up, np.hypot(x, y))], -1).reshape(-1, 2))
    return np.concatenate(directions).astype(np.float32)

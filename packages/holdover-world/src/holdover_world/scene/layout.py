"""A layout: the map and the cars that a world model may be told of, and places in it.

It has the static and dynamic controls of a driving simulator: lanes, markings and kerbs as a raster of the ground,
boxes that stand on it, and a log of where the cars are. So it tells how far away everything is and its rough colour,
without textures.

Shape suffixes: G rows and H columns of the ground, M boxes that stand, C cars, J boxes that they are made of, T video
frames of the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from holdover_world.scene.palette import GROUNDS
from holdover_world.scene.poses import placed

FILE = "layout.npz"
METRES = 0.2  # the side of a square of the ground


@dataclass(frozen=True)
class Layout:
    """A map, and where cars are on it.

    Attributes:
        ground_GH: ``uint8``, the kind of each square, a number in `GROUNDS`. Beyond the raster is grass.
        corner_2: x and y of the corner of square [0, 0], metres.
        boxes_M10: the boxes that stand still: x and y of the middle, heading, half the length, half the width, bottom,
            top, red, green, blue.
        parts_J10: the boxes of the cars: the number of the car, metres ahead of the car's middle, an unused column, and
            the rest as in ``boxes_M10`` from half the length on.
        poses_TC3: x, y and heading of each car at each video frame.
    """

    ground_GH: Tensor
    corner_2: Tensor
    boxes_M10: Tensor
    parts_J10: Tensor
    poses_TC3: Tensor

    LEVELS: ClassVar[int] = 4

    @cached_property
    def texels(self) -> tuple[Tensor, Tensor]:
        """The ground's colours in squares of one, two, four and eight times `METRES`.

        Returns:
            ``int32``, one number per square: red, green and blue, from the lowest bits up. The levels follow each
            other, row by row, and a frame of grass stands around each. And ``int64 [LEVELS, 3]``: rows and columns
            without the frame, and where each level begins.
        """
        palette = torch.tensor(list(GROUNDS.values()), device=self.ground_GH.device).mul(255).round()
        level, parts, sizes, first = palette[self.ground_GH.long()], [], [], 0
        weights = palette.new_tensor([1, 2**8, 2**16])
        for _ in range(self.LEVELS):
            rows, columns = level.shape[:2]
            framed = palette[0].expand(rows + 2, columns + 2, 3).clone()
            framed[1:-1, 1:-1] = level
            parts.append((framed @ weights).int().flatten())
            sizes.append((rows, columns, first))
            first += len(parts[-1])
            even = level[: rows // 2 * 2, : columns // 2 * 2]
            level = ((even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4).round()
        return torch.cat(parts), torch.tensor(sizes, device=palette.device)

    def cars(self, frames: Sequence[int]) -> Tensor:
        """Poses of the cars in these video frames, ``[K, C, 3]``. After the log's end they keep their last speed."""
        end = len(self.poses_TC3) - 1
        at = torch.tensor(frames, device=self.poses_TC3.device)
        poses = self.poses_TC3[at.clamp(0, end)].clone()
        if end > 0 and (beyond := (at - end).clamp(min=0)).any():
            step = self.poses_TC3[end, :, :2] - self.poses_TC3[end - 1, :, :2]
            poses[..., :2] += beyond[:, None, None] * step
        return poses

    def to(self, device: torch.device | str) -> Layout:
        if self.ground_GH.device == torch.device(device):
            return self  # and keep the texels that are worked out already
        return Layout(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def save(self, folder: Path) -> None:
        """Write the layout to the folder of a clip."""
        partial = folder / f".partial-{FILE}"
        with partial.open("wb") as file:
            np.savez_compressed(file, **{field.name: getattr(self, field.name).numpy() for field in fields(self)})
        partial.replace(folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Layout | None:
        """Read the layout of a clip; None if it has none.

        Raises:
            ValueError: the file is damaged.
        """
        if not (folder / FILE).is_file():
            return None
        try:
            with (folder / FILE).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return cls(**{field.name: torch.from_numpy(arrays[field.name]) for field in fields(cls)})
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise ValueError(f"{folder / FILE} is damaged ({error}): record the clip again") from error


@dataclass(frozen=True)
class Track:
    """A layout, and how a recording went through it: pose ``[T, 3]`` and motion ``[T, 2]`` in each video frame."""

    layout: Layout
    poses_T3: Tensor
    motion_T2: Tensor

    def to(self, device: torch.device | str) -> Track:
        """The same with its layout on a device."""
        return replace(self, layout=self.layout.to(device))

    def site(self, frame: int) -> Site:
        """Where the ego was in a video frame."""
        return Site(self.layout, self.poses_T3[frame].double(), frame)


@dataclass(frozen=True)
class Site:
    """The place of an ego in a layout.

    Attributes:
        layout: the layout.
        pose_3: x, y and yaw in it, ``float64 [3]``, on the CPU.
        frame: the video frame of the log.
        kept: what was worked out for this place, by who did.
    """

    layout: Layout
    pose_3: Tensor
    frame: int
    kept: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def moved(self, pose_3: Tensor, frames: int) -> Site:
        """The place that many video frames later, at a pose relative to this one."""
        return Site(self.layout, self.ahead(pose_3[None])[0], self.frame + frames)

    def ahead(self, poses_K3: Tensor) -> Tensor:
        """Poses relative to this one, in the layout's coordinates."""
        return placed(self.pose_3[None], poses_K3.double().cpu()[None])[0]

    def state_dict(self) -> dict[str, Tensor]:
        # Copies: rows of a batch may share a layout, and a file of safetensors holds nothing twice.
        own = {each.name: getattr(self.layout, each.name).clone() for each in fields(Layout)}
        return {**own, "pose": self.pose_3, "frame": torch.tensor(self.frame)}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> Site:
        """The reverse of `state_dict`."""
        layout = Layout(**{field.name: tensors[field.name] for field in fields(Layout)})
        return cls(layout, tensors["pose"].cpu(), int(tensors["frame"]))


class Sites(tuple[Site | None, ...]):
    """Per row of a batch its place, or None where the row has no layout; empty where no row has one."""

    def moved(self, ends_B3: Tensor, frames: int) -> Sites:
        """The places that many video frames later, each at a pose relative to its present one."""
        ends = zip(self, ends_B3, strict=True) if self else ()
        return Sites(site and site.moved(end, frames) for site, end in ends)

    def take(self, rows: Sequence[int]) -> Sites:
        """The places of some rows."""
        return Sites(self[row] for row in rows if self)

    def state_dict(self) -> dict[str, Tensor]:
        named = [(f"{row}.{name}", t) for row, site in enumerate(self) if site for name, t in site.state_dict().items()]
        return dict(named)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], rows: int) -> Sites:
        """The reverse of `state_dict`, for a batch of this many rows."""
        found: list[Site | None] = []
        for row in range(rows):
            own = {name.removeprefix(f"{row}."): t for name, t in tensors.items() if name.startswith(f"{row}.")}
            found.append(Site.from_state_dict(own) if own else None)
        return cls(found if any(found) else ())

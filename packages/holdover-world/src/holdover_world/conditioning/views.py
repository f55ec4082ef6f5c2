"""Moving cameras as tensors: where they see points, and what other cameras saw there.

All cameras of a rig stand on one axis, one after the other, so that each operation runs once for all of them.

Shape suffixes: K video frames, V cameras, M points, C channels of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from holdover_world.config import SCALE, WorldConfig
from holdover_world.scene.cameras import Camera, camera_axes, camera_rays
from holdover_world.scene.depth import FAR

FINE = 2  # side in pixels of the squares for which boxes are searched


@dataclass(frozen=True, eq=False)
class View:
    """The geometry of a camera.

    Attributes:
        camera: the camera.
        place_3: its position in ego coordinates.
        axes_33: its axes right, down and forward, as rows.
        order_M: the numbers of its pixels, counted row by row, in the order of the rig.
    """

    camera: Camera
    place_3: Tensor
    axes_33: Tensor
    order_M: Tensor

    @property
    def slope(self) -> float:
        """The slope of the ray through the middle of the right edge."""
        return math.tan(math.radians(self.camera.fov) / 2)

    @property
    def ratio(self) -> float:
        """Width of the picture by its height."""
        return self.camera.width / self.camera.height

    def project(self, points_3M: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the picture points of the camera's axes are, -1 to 1 each way ``[2, M]``, and which are in it."""
        return _project(points_3M, self.slope, self.ratio)


@dataclass(frozen=True, eq=False)
class Grid:
    """Rays through the squares or pixels of all cameras.

    Attributes:
        parts: the part of each camera.
        rays_3M: the rays in the axes of their camera; the component along the viewing axis is 1.
        ground_M: the distance of flat ground along them.
        slope_M, ratio_M: `View.slope` and `View.ratio` of their camera.
    """

    parts: tuple[slice, ...]
    rays_3M: Tensor
    ground_M: Tensor
    slope_M: Tensor
    ratio_M: Tensor

    @classmethod
    def of(cls, views: Sequence[View], every: int) -> Grid:
        """The squares of this many pixels, row by row; or the pixels, in the order of the rig."""
        device, parts, tables = views[0].place_3.device, list[slice](), []
        for view in views:
            rays_M3 = torch.from_numpy(camera_rays(view.camera, every=every)).float().to(device).flatten(0, 1)
            if every == 1:
                rays_M3 = rays_M3[view.order_M]
            down = -rays_M3[:, 2]
            ground = torch.where(down > 1e-3, view.camera.position[2] / down.clamp(min=1e-3), FAR).clamp(max=FAR)
            same = [torch.full_like(ground, each) for each in (view.slope, view.ratio)]
            tables.append(torch.cat([view.axes_33 @ rays_M3.T, torch.stack([ground, *same])]))
            start = parts[-1].stop if parts else 0
            parts.append(slice(start, start + len(ground)))
        rays_3M, others = torch.cat(tables, 1).split([3, 3])
        return cls(tuple(parts), rays_3M, *others.unbind())

    def project(self, points_3KM: Tensor) -> tuple[Tensor, Tensor]:
        """`View.project` of each camera: ``[2, K, M]`` and ``[K, M]``."""
        return _project(points_3KM, self.slope_M, self.ratio_M)


@dataclass(frozen=True, eq=False)
class Rig:
    """The cameras of a model on a device.

    Their pixels stand in the order of the tokens of colour: token by token, in it latent by latent, in it square by
    square of 2 by 2 pixels, each row by row. So latents and tokens are plain parts of the axis of pixels.

    Attributes:
        views: the cameras, in the order of the tokens.
        pixels: the grid of pixels.
        coarse: the grid of squares of 8 by 8 pixels.
        fine: the grid of squares of 2 by 2 pixels.
        fine_order_S: the numbers of the squares of ``fine`` in the order of the pixels.
        padded_D: the pixels that the tokens of depth cover, in the order of these tokens; at edges some stand twice.
        unpadded_M: where each pixel stands among them.
    """

    views: tuple[View, ...]
    pixels: Grid
    coarse: Grid
    fine: Grid
    fine_order_S: Tensor
    padded_D: Tensor
    unpadded_M: Tensor

    def __deepcopy__(self, _: dict[int, object]) -> Rig:
        """Itself. Nothing changes it, so copies of a model share it."""
        return self

    @classmethod
    def of(cls, sizes: WorldConfig, device: torch.device) -> Rig:
        views, pixels, covering = list[View](), 0, 0
        squares, padded, unpadded = list[Tensor](), list[Tensor](), list[Tensor]()
        side, depth_side = SCALE * sizes.patch, SCALE * sizes.depth_patch
        for camera in (camera for group in sizes.groups for camera in group):
            rows, columns = camera.height, camera.width
            order = _nested(torch.arange(rows * columns).view(rows, columns), (side, SCALE, FINE))
            axes = torch.from_numpy(camera_axes(camera)).float()
            views.append(View(camera, *(t.to(device) for t in (torch.tensor(camera.position), axes, order))))
            small = torch.arange(rows * columns // FINE**2).view(rows // FINE, -1)
            squares.append(_nested(small, (side // FINE, SCALE // FINE)) + pixels // FINE**2)
            at = order.new_empty(len(order)).scatter_(0, order, torch.arange(len(order))).view(rows, columns)
            below, right = -rows % depth_side, -columns % depth_side
            whole = F.pad(at[None].double(), (0, right, 0, below), mode="replicate")[0].long()
            covered = _nested(torch.arange(whole.numel()).view(whole.shape), (depth_side, SCALE, FINE))
            own = torch.empty_like(covered).scatter_(0, covered, torch.arange(len(covered))).view(whole.shape)
            unpadded.append(own[:rows, :columns].flatten()[order] + covering)
            padded.append(whole.flatten()[covered] + pixels)
            pixels, covering = pixels + len(order), covering + len(covered)
        grids = (Grid.of(views, 1), Grid.of(views, SCALE), Grid.of(views, FINE))
        return cls(tuple(views), *grids, *(torch.cat(each).to(device) for each in (squares, padded, unpadded)))

    def pictures(self, values_CM: Tensor) -> list[Tensor]:
        """Values of all pixels as one picture ``[C, height, width]`` per camera."""
        found = []
        for view, part in zip(self.views, self.pixels.parts, strict=True):
            picture_CM = values_CM.new_empty(len(values_CM), len(view.order_M))
            picture_CM[:, view.order_M] = values_CM[:, part]
            found.append(picture_CM.unflatten(1, (view.camera.height, view.camera.width)))
        return found


def block_order() -> Tensor:
    """The numbers of the pixels of a latent, counted row by row, in the order of a rig."""
    return _nested(torch.arange(SCALE**2).view(SCALE, SCALE), (FINE,))


def _nested(grid_hw: Tensor, sides: Sequence[int]) -> Tensor:
    """The elements of a grid in squares of the first side, these in squares of the next, and so on; row by row."""
    for side in sides:
        squares = grid_hw.unflatten(-2, (-1, side)).unflatten(-1, (-1, side))
        grid_hw = squares.transpose(-3, -2)
    return grid_hw.flatten()


@dataclass(frozen=True, eq=False)
class Move:
    """From the ego's coordinates at K poses to the present ones: rotations ``[K, 3, 3]`` and shifts ``[K, 3]``."""

    turn_K33: Tensor
    shift_K3: Tensor

    @classmethod
    def of(cls, poses_K3: Tensor) -> Move:
        x, y, yaw = poses_K3.unbind(-1)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        turn = [yaw.cos(), -yaw.sin(), zero, yaw.sin(), yaw.cos(), zero, zero, zero, one]
        return cls(torch.stack(turn, -1).unflatten(-1, (3, 3)), torch.stack([x, y, zero], -1))

    def places(self, view: View) -> Tensor:
        """Positions of a camera at the poses, in present coordinates ``[K, 3]``."""
        return self.turn_K33 @ view.place_3 + self.shift_K3

    def points(self, views: Sequence[View], grid: Grid, depth_KM: Tensor) -> Tensor:
        """Points that cameras will see along their rays at these distances, in their present axes ``[3, K, M]``."""
        points_3KM = depth_KM.new_empty(3, *depth_KM.shape)
        for view, part in zip(views, grid.parts, strict=True):
            turn_K33 = view.axes_33 @ self.turn_K33 @ view.axes_33.T
            shift_3K = view.axes_33 @ (self.places(view) - view.place_3).T
            own = points_3KM[:, :, part]
            torch.mm(turn_K33.movedim(1, 0).flatten(0, 1), grid.rays_3M[:, part], out=own.view(-1, own.shape[-1]))
            torch.addcmul(shift_3K[..., None], own, depth_KM[:, part], out=own)
        return points_3KM

    def depth(self, view: View, points_3KM: Tensor) -> Tensor:
        """Distances along a camera's future axis of points in present ego coordinates, ``[K, M]``."""
        forward_K3 = self.turn_K33 @ view.axes_33[2]
        beside_3KM = points_3KM - self.places(view).T[..., None]
        return (forward_K3.T[..., None] * beside_3KM).sum(0)


def look(
    views: Sequence[View], grid: Grid, pictures: Sequence[Tensor], points_3KM: Tensor, *, nearest: int = 0
) -> tuple[Tensor, Tensor]:
    """Look points up in pictures: in the picture of their own camera, or else in the first one that shows them.

    Args:
        grid: whose rays these points are on.
        pictures: per camera ``[C, h, w]``.
        points_3KM: the points, in the axes of their camera.
        nearest: the number of last channels that are not interpolated.

    Returns:
        The values ``[C, K, M]``, and for which points any were found ``[K, M]``.
    """
    at_2KM, found_KM = grid.project(points_3KM)
    values_CKM = points_3KM.new_empty(len(pictures[0]), *found_KM.shape)
    values, points, found = values_CKM.flatten(1), points_3KM.flatten(1), found_KM.view(-1)
    missing, elsewhere = [], []
    for picture, view, part in zip(pictures, views, grid.parts, strict=True):
        values_CKM[:, :, part] = _sample(picture, at_2KM[:, :, part], nearest)
        k, m = (~found_KM[:, part]).nonzero(as_tuple=True)
        missing.append(k * found_KM.shape[1] + m + part.start)
        elsewhere.append(torch.addmm(view.place_3[:, None], view.axes_33.T, points.index_select(1, missing[-1])))
    ego_3P, place_P = torch.cat(elsewhere, 1), torch.cat(missing)
    for picture, view in zip(pictures, views, strict=True):
        at_2P, here_P = view.project(view.axes_33 @ (ego_3P - view.place_3[:, None]))
        here, left = here_P.nonzero()[:, 0], (~here_P).nonzero()[:, 0]
        place = place_P.index_select(0, here)
        values.index_copy_(1, place, _sample(picture, at_2P.index_select(1, here)[:, None], nearest)[:, 0])
        found.index_fill_(0, place, True)
        ego_3P, place_P = ego_3P.index_select(1, left), place_P.index_select(0, left)
    values.index_fill_(1, place_P, 0)
    return values_CKM, found_KM


def _project(points: Tensor, slope: Tensor | float, ratio: Tensor | float) -> tuple[Tensor, Tensor]:
    right, down, forward = points
    scale = 1 / (forward.clamp(min=0.1) * slope)
    at = torch.stack([right * scale, (down * scale).mul_(ratio)])
    x, y = at.abs()
    return at, (torch.maximum(x, y) <= 1) & (forward > 0.1)


def _sample(picture_Chw: Tensor, at_2KM: Tensor, nearest: int) -> Tensor:
    """Values ``[C, K, M]`` at places in a picture. Each video frame is a picture of its own, for the threads."""
    places, count = at_2KM.movedim(0, -1)[:, None], at_2KM.shape[1]
    smooth = len(picture_Chw) - nearest
    found = F.grid_sample(
        picture_Chw[:smooth].expand(count, -1, -1, -1), places, padding_mode="border", align_corners=False
    )
    if nearest:
        kept = picture_Chw[smooth:].expand(count, -1, -1, -1)
        rest = F.grid_sample(kept, places, mode="nearest", padding_mode="border", align_corners=False)
        found = torch.cat([found, rest], 1)
    return found[:, :, 0].movedim(0, 1)

"""Moving cameras as tensors: where they see points, and what other cameras saw there.

Shape suffixes: K video frames, M points, C channels of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from holdover_world.config import SCALE
from holdover_world.scene.cameras import Camera, camera_axes, camera_rays
from holdover_world.scene.depth import FAR


@dataclass(frozen=True)
class View:
    """The geometry of a camera.

    Attributes:
        camera: the camera.
        place_3: its position in ego coordinates.
        axes_33: its axes right, down and forward, as rows.
        squares: for squares of 8 by 8 pixels the rays in these axes ``[3, M]``, and the distance of flat ground along
            them ``[M]``.
        pixels: the same for pixels.
    """

    camera: Camera
    place_3: Tensor
    axes_33: Tensor
    squares: tuple[Tensor, Tensor]
    pixels: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, camera: Camera, device: torch.device) -> View:
        axes = torch.from_numpy(camera_axes(camera)).float().to(device)
        grids = []
        for size in (SCALE, 1):
            rays_M3 = torch.from_numpy(camera_rays(camera, every=size)).float().to(device).flatten(0, 1)
            down = -rays_M3[:, 2]
            ground = torch.where(down > 1e-3, camera.position[2] / down.clamp(min=1e-3), FAR).clamp(max=FAR)
            grids.append((axes @ rays_M3.T, ground))
        return cls(camera, torch.tensor(camera.position, device=device), axes, *grids)

    @property
    def slope(self) -> float:
        """The slope of the ray through the middle of the right edge."""
        return math.tan(math.radians(self.camera.fov) / 2)

    def project(self, points_3KM: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the picture points of the camera's axes are, -1 to 1 each way ``[K, M, 2]``, and which are in it."""
        right, down, forward = points_3KM
        scale = 1 / (forward.clamp(min=0.1) * self.slope)
        at = torch.stack([right * scale, down * scale * (self.camera.width / self.camera.height)], -1)
        return at, (at.abs().amax(-1) <= 1).logical_and_(forward > 0.1)


@dataclass(frozen=True)
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

    def points(self, view: View, rays_3M: Tensor, depth_KM: Tensor) -> Tensor:
        """Points that a camera will see along rays at these distances, in its present axes ``[3, K, M]``."""
        turn_K33 = view.axes_33 @ self.turn_K33 @ view.axes_33.T
        shift_3K = view.axes_33 @ (self.places(view) - view.place_3).T
        directions_3KM = (turn_K33.movedim(1, 0).flatten(0, 1) @ rays_3M).unflatten(0, (3, -1))
        return torch.addcmul(shift_3K[..., None], directions_3KM, depth_KM)

    def depth(self, view: View, points_3KM: Tensor) -> Tensor:
        """Distances along a camera's future axis of points in present ego coordinates, ``[K, M]``."""
        forward_K3 = self.turn_K33 @ view.axes_33[2]
        beside_3KM = points_3KM - self.places(view).T[..., None]
        return (forward_K3.T[..., None] * beside_3KM).sum(0)


def look(
    views: Sequence[View], pictures: Sequence[Tensor], points: Sequence[Tensor], *, nearest: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Look points up in pictures: in the picture of their own camera, or else in the first one that shows them.

    Args:
        pictures: per camera ``[C, h, w]``.
        points: per camera, in its axes ``[3, K, M]``.
        nearest: the number of last channels that are not interpolated.

    Returns:
        Per camera the values ``[C, K, M]``, and for which points any were found ``[K, M]``.
    """
    looked, missing, elsewhere = [], [], []
    for picture, view, points_3KM in zip(pictures, views, points, strict=True):
        at, found_KM = view.project(points_3KM)
        looked.append((_sample(picture, at, nearest), found_KM))
        missing.append((~found_KM).flatten().nonzero()[:, 0])
        elsewhere.append(view.axes_33.T @ points_3KM.flatten(1)[:, missing[-1]] + view.place_3[:, None])
    ego_3M = torch.cat(elsewhere, 1)
    values_CM = ego_3M.new_zeros(len(pictures[0]), ego_3M.shape[1])
    found_M = torch.zeros_like(values_CM[0], dtype=torch.bool)
    left = torch.arange(len(found_M), device=found_M.device)
    for picture, view in zip(pictures, views, strict=True):
        at, here_KM = view.project((view.axes_33 @ (ego_3M[:, left] - view.place_3[:, None]))[:, None])
        here = here_KM[0].nonzero()[:, 0]
        values_CM[:, left[here]] = _sample(picture, at[:, here], nearest)[:, 0]
        found_M[left[here]] = True
        left = left[~here_KM[0]]
    counts = [len(places) for places in missing]
    others = zip(looked, missing, values_CM.split(counts, 1), found_M.split(counts), strict=True)
    for (all_CKM, all_KM), places, values, found in others:
        all_CKM.flatten(1)[:, places], all_KM.flatten()[places] = values, found
    return looked


def _sample(picture_Chw: Tensor, at_KM2: Tensor, nearest: int) -> Tensor:
    smooth = len(picture_Chw) - nearest
    found = F.grid_sample(picture_Chw[None, :smooth], at_KM2[None], padding_mode="border", align_corners=False)[0]
    if not nearest:
        return found
    kept = picture_Chw[None, smooth:]
    rest = F.grid_sample(kept, at_KM2[None], mode="nearest", padding_mode="border", align_corners=False)[0]
    return torch.cat([found, rest])

"""A layout as the cameras of a moving ego see it: how far away everything is, what it is, and its rough colour.

The ground is drawn pixel by pixel, boxes square by square of 2 by 2 pixels, in all cameras at once. What does not
change while the ego drives on is worked out once per rig (`Scenery`) and once per place of an ego (`Around`).

Shape suffixes: K poses, V cameras, M pixels of all cameras, S squares of all cameras, N boxes near the ego, E pairs of
a pose and a box in a picture, R rows of the rectangles around them, X squares in these rectangles, W squares where a
box is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from holdover_world.conditioning.views import FINE, Rig
from holdover_world.scene.depth import FAR
from holdover_world.scene.layout import METRES, Layout
from holdover_world.scene.palette import FOG, HORIZON, SHADE, SUN, ZENITH

_REACH = 180.0  # metres around the place of an ego within which boxes are searched
_CLOSE = 0.2  # metres before a camera; whatever is nearer counts as behind it
SKY, GROUND = 0, 1
_NOTHING, _LAST = torch.iinfo(torch.int64).max, torch.iinfo(torch.int32).max


class Drawn(NamedTuple):
    """What the cameras see at K poses.

    Attributes:
        depth_KM: metres along the viewing axis, per pixel.
        what_KM: the face of a box, by a number that is the same for all poses; or `SKY`, or `GROUND`.
        colour_3KM: the colour, from -1 to 1.
        cars: the squares where cars are seen, as places in ``[K, S]``, and the numbers of the cars.
    """

    depth_KM: Tensor
    what_KM: Tensor
    colour_3KM: Tensor
    cars: tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Scenery:
    """What a rig sees of the ground and the sky wherever it is.

    Attributes:
        rig: the cameras.
        rays_3S: the rays through the squares, in ego coordinates.
        flat_2M: the place on the ground relative to the camera, in ego coordinates.
        level_M: the level of the layout's ground that is as coarse as the pixel.
        fog_M: the share of the horizon's colour in that of the ground.
        ground_M: 1 where the ground is seen if there is no box, 0 where the sky is.
        sky_3M: the colour of the sky.
    """

    rig: Rig
    rays_3S: Tensor
    flat_2M: Tensor
    level_M: Tensor
    fog_M: Tensor
    ground_M: Tensor
    sky_3M: Tensor

    def __deepcopy__(self, _: dict[int, object]) -> Scenery:
        """Itself. Nothing changes it, so copies of a model share it."""
        return self

    @classmethod
    def of(cls, rig: Rig) -> Scenery:
        grid, focal = rig.pixels, [view.camera.width / 2 / view.slope for view in rig.views]
        rays_3M, rays_3S = (
            torch.cat([v.axes_33.T @ each.rays_3M[:, p] for v, p in zip(rig.views, each.parts, strict=True)], 1)
            for each in (grid, rig.fine)
        )
        metres_M = torch.cat([grid.ground_M[part] / each for each, part in zip(focal, grid.parts, strict=True)])
        horizon, zenith = (rays_3M.new_tensor(colour)[:, None] for colour in (HORIZON, ZENITH))
        up_M = (rays_3M[2] / rays_3M.norm(dim=0)).clamp(min=0)
        return cls(
            rig=rig,
            rays_3S=rays_3S,
            flat_2M=rays_3M[:2] * grid.ground_M,
            level_M=(metres_M / METRES).clamp(min=1).log2().ceil().long().clamp(max=Layout.LEVELS - 1),
            fog_M=_fog(grid.ground_M),
            ground_M=(grid.ground_M < FAR).float(),
            sky_3M=2 * torch.lerp(horizon, zenith, up_M**0.7) - 1,
        )


@dataclass(frozen=True, eq=False)
class Around:
    """What stands around an ego, and what its cameras may see of it while it drives on.

    Attributes:
        layout: the layout.
        scenery: what the cameras see everywhere.
        centre_2: where the ego is.
        standing_N10: the boxes near it that stand still, with the columns of `Layout.boxes_M10`.
        car_N: the number of the car that a box belongs to; -1 for boxes that stand still. The boxes of cars come last.
        ends_2M, columns_M, first_M: how the ground of a pixel's level lies in `Layout.texels`: the greatest column and
            row, the number of columns, and the first square.
    """

    layout: Layout
    scenery: Scenery
    centre_2: Tensor
    standing_N10: Tensor
    car_N: Tensor
    ends_2M: Tensor
    columns_M: Tensor
    first_M: Tensor

    @classmethod
    def of(cls, layout: Layout, scenery: Scenery, centre_2: Tensor) -> Around:
        near = (layout.boxes_M10[:, :2] - centre_2).norm(dim=1) < _REACH
        standing = layout.boxes_M10[near]
        cars = layout.parts_J10[:, 0].long()
        nobody = cars.new_full((len(standing),), -1)
        rows, columns, first = layout.texels[1].to(torch.int32).T[:, scenery.level_M]
        framed = columns + 2  # a frame of grass is around each level
        ends = torch.stack([columns, rows]).to(standing.dtype)
        return cls(layout, scenery, centre_2, standing, torch.cat([nobody, cars]), ends, framed, first + framed + 1)

    def boxes(self, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The boxes in these video frames of the log ``[10, K, N]``, and which of them are near ``[K, N]``."""
        parts = self.layout.parts_J10
        cars_KJ3 = self.layout.cars(frames)[:, parts[:, 0].long()]
        heading = cars_KJ3[..., 2:]
        ahead = parts[:, 1:2] * torch.cat([heading.cos(), heading.sin()], -1)
        sizes = parts[:, 3:].expand(len(cars_KJ3), -1, -1)
        moving = torch.cat([cars_KJ3[..., :2] + ahead, heading, sizes], -1)
        standing = self.standing_N10.expand(len(cars_KJ3), -1, -1)
        near = (cars_KJ3[..., :2] - self.centre_2).norm(dim=-1) < _REACH
        boxes_KN10 = torch.cat([standing, moving], 1)
        return boxes_KN10.movedim(2, 0).contiguous(), torch.cat([near.new_ones(standing.shape[:2]), near], 1)


class _Seen(NamedTuple):
    """The squares where a box is seen: their places in ``[K, S]``, in the order of the pixels, and what is there."""

    place_W: Tensor
    depth_W: Tensor
    what_W: Tensor
    car_W: Tensor
    colour_3W: Tensor


def draw(around: Around, poses_K3: Tensor, frames: Sequence[int]) -> Drawn:
    """What the cameras see.

    Args:
        poses_K3: the poses of the ego, in the layout's coordinates.
        frames: the video frame of the log at each pose.
    """
    seen = _boxes(around, poses_K3, frames)
    shape = len(poses_K3), -1
    depth_KM = _with_boxes(around.scenery.rig.pixels.ground_M.expand(shape), seen.place_W, seen.depth_W)
    what_KM = _with_boxes(around.scenery.ground_M.expand(shape), seen.place_W, seen.what_W)
    colour_3KM = _with_boxes(_ground(around, poses_K3), seen.place_W, seen.colour_3W)
    on_car = (seen.car_W >= 0).nonzero()[:, 0]
    return Drawn(depth_KM, what_KM, colour_3KM, (seen.place_W[on_car], seen.car_W[on_car]))


def faces(around: Around, poses_K3: Tensor, frames: Sequence[int]) -> Tensor:
    """`Drawn.what_KM` alone."""
    seen = _boxes(around, poses_K3, frames)
    return _with_boxes(around.scenery.ground_M.expand(len(poses_K3), -1), seen.place_W, seen.what_W)


def _with_boxes(values_KM: Tensor, place_W: Tensor, seen_W: Tensor) -> Tensor:
    """Values of pixels ``[*, K, M]`` with those of squares ``[*, W]`` put in their places."""
    found = values_KM.clone(memory_format=torch.contiguous_format)
    squares = found.view(*found.shape[:-2], -1, FINE**2)
    squares.index_copy_(-2, place_W, seen_W[..., None].expand(*seen_W.shape, FINE**2))
    return found


def _boxes(around: Around, poses_K3: Tensor, frames: Sequence[int]) -> _Seen:
    """The nearest box in each square of each picture."""
    rig, grid = around.scenery.rig, around.scenery.rig.fine
    squares, boxes = len(rig.fine_order_S), around.boxes(frames)
    view_E, pose_E, box_E, low_2E, high_2E = _rectangles(rig, *boxes, poses_K3)
    # Each row of the rectangle around each box that is in a picture, and each square of each row.
    columns_E = low_2E.new_tensor([view.camera.width // FINE for view in rig.views])[view_E]
    start_E = low_2E.new_tensor([part.start for part in grid.parts])[view_E]
    width_E, height_E = high_2E - low_2E
    pair_R = torch.repeat_interleave(height_E)
    first_E = start_E + low_2E[0] + (low_2E[1] - height_E.cumsum(0) + height_E) * columns_E
    width_R, columns_R = width_E[pair_R], columns_E[pair_R]
    first_R = first_E[pair_R] + torch.arange(len(pair_R), device=pair_R.device) * columns_R
    row_X = torch.repeat_interleave(width_R)
    square_X = (first_R - width_R.cumsum(0) + width_R).index_select(0, row_X)
    square_X += torch.arange(len(row_X), device=row_X.device)
    pair_X = pair_R.index_select(0, row_X)
    # The camera and the rays in the coordinates of each box.
    boxes_10E = boxes[0].flatten(1)[:, pose_E * boxes[0].shape[2] + box_E]
    heading_2E = torch.stack([boxes_10E[2].cos(), boxes_10E[2].sin()])
    back_2E = heading_2E * heading_2E.new_tensor([[1], [-1]])
    turned_2K = torch.stack([poses_K3[:, 2].cos(), poses_K3[:, 2].sin()])
    place_V3 = torch.stack([view.place_3 for view in rig.views])
    place_2VK = poses_K3.T[:2, None] + _turn(place_V3.T[:2, :, None], turned_2K[:, None])
    beside_2E = place_2VK[:, view_E, pose_E] - boxes_10E[:2]
    over_E = place_V3[view_E, 2] - boxes_10E[5:7].mean(0)
    half_3E = torch.stack([boxes_10E[3], boxes_10E[4], (boxes_10E[6] - boxes_10E[5]) / 2])
    about_8E = torch.cat([_turn(beside_2E, back_2E), over_E[None], half_3E, _turn(turned_2K[:, pose_E], back_2E)])
    own_3X, half_3X, relative_2X = about_8E.index_select(1, pair_X).split([3, 3, 2])
    ray_3X = around.scenery.rays_3S.index_select(1, square_X)
    ray_3X[:2] = _turn(ray_3X[:2], relative_2X)
    ray_3X = ray_3X.masked_fill_(ray_3X.abs() < 1e-6, 1e-6)
    middle_3X, reach_3X = -own_3X / ray_3X, half_3X / ray_3X.abs()
    first_3X, last_3X = middle_3X - reach_3X, middle_3X + reach_3X
    enters_X = torch.maximum(torch.maximum(first_3X[0], first_3X[1]), first_3X[2])
    leaves_X = torch.minimum(torch.minimum(last_3X[0], last_3X[1]), last_3X[2])
    hit_H = ((enters_X < leaves_X) & (enters_X > _CLOSE)).nonzero()[:, 0]
    # The nearest hit of each square. Distances are positive, so their bits have the order of the numbers. Of faces in
    # one plane the last one counts. Plain writes would leave the choice to the order of the threads.
    key_H = (enters_X.index_select(0, hit_H).view(torch.int32).long() << 32) | (_LAST - hit_H)
    where_H = pose_E.index_select(0, pair_X.index_select(0, hit_H)) * squares + square_X.index_select(0, hit_H)
    best = key_H.new_full((len(poses_K3) * squares,), _NOTHING).scatter_reduce_(0, where_H, key_H, "amin")
    best = best.view(-1, squares).index_select(1, rig.fine_order_S).flatten()
    place_W = (best != _NOTHING).nonzero()[:, 0]
    key_W = best.index_select(0, place_W)
    seen_W, depth_W = _LAST - (key_W & 0xFFFFFFFF), (key_W >> 32).int().view(torch.float32)
    pair_W = pair_X.index_select(0, seen_W)
    axis_W = first_3X.index_select(1, seen_W).max(0).indices
    below_W = ray_3X.index_select(1, seen_W).gather(0, axis_W[None])[0] > 0
    box_W = box_E.index_select(0, pair_W)
    bright_W = _brightness(heading_2E.index_select(1, pair_W), axis_W, below_W)
    colour_3W = (boxes_10E[7:].index_select(1, pair_W) * bright_W).clamp_(max=1)
    return _Seen(
        place_W=place_W,
        depth_W=depth_W,
        what_W=(2 + 6 * box_W + 2 * axis_W + below_W).float(),
        car_W=around.car_N.index_select(0, box_W),
        colour_3W=2 * torch.lerp(colour_3W, _horizon(colour_3W), _fog(depth_W)) - 1,
    )


def _rectangles(
    rig: Rig, boxes_10KN: Tensor, near_KN: Tensor, poses_K3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Camera, pose and box of each pair that is in a picture, ``[E]``, and its first and last column and row
    ``[2, E]``."""
    x, y, yaw = poses_K3.T[..., None]
    back = torch.stack([yaw.cos(), -yaw.sin()])
    flat_2KN = _turn(boxes_10KN[:2] - torch.stack([x, y]), back)
    middle_3KN = torch.cat([flat_2KN, boxes_10KN[5:7].mean(0, keepdim=True)])
    half_3KN = torch.cat([boxes_10KN[3:5], (boxes_10KN[6:7] - boxes_10KN[5:6]) / 2])
    radius_KN = half_3KN.square().sum(0).sqrt() + 0.01
    # First balls around the boxes, against the planes through the edges of each picture.
    size_2V = x.new_tensor([[view.camera.width // FINE, view.camera.height // FINE] for view in rig.views]).T
    slope_V = x.new_tensor([view.slope for view in rig.views])
    slope_2V11 = (slope_V * size_2V / size_2V[0])[..., None, None]
    axes_V33, place_V3 = (torch.stack([getattr(v, name) for v in rig.views]) for name in ("axes_33", "place_3"))
    beside = (axes_V33.flatten(0, 1) @ middle_3KN.flatten(1)).view(-1, 3, *near_KN.shape)
    beside_3VKN = (beside - (axes_V33 @ place_V3[..., None])[..., None]).movedim(1, 0)
    (across_VKN, down_VKN), forward_VKN = beside_3VKN[:2].abs() - slope_2V11 * beside_3VKN[2], beside_3VKN[2]
    reach_2VKN = (1 + slope_2V11.square()).sqrt() * radius_KN
    may = near_KN & (across_VKN < reach_2VKN[0]) & (down_VKN < reach_2VKN[1]) & (forward_VKN + radius_KN > _CLOSE)
    view_E, pose_E, box_E = may.nonzero(as_tuple=True)
    place_E = pose_E * near_KN.shape[1] + box_E
    # Then the corners of those that are left.
    yaw_E = boxes_10KN[2].flatten()[place_E]
    ahead, left = _turn(torch.stack([yaw_E.cos(), yaw_E.sin()]), back[:, pose_E, 0])
    axes_33E, half_3E = axes_V33.movedim(0, 2)[:, :, view_E], half_3KN.flatten(1)[:, place_E]
    right, beside_E, up = axes_33E.unbind(1)
    edges = (
        (right * ahead + beside_E * left) * half_3E[0],
        (beside_E * ahead - right * left) * half_3E[1],
        up * half_3E[2],
    )
    corners_38E = beside_3VKN[:, view_E, pose_E, box_E][:, None]
    for edge_3E in edges:
        corners_38E = torch.cat([corners_38E - edge_3E[:, None], corners_38E + edge_3E[:, None]], 1)
    across_28E, forward_8E = corners_38E[:2], corners_38E[2]
    at = across_28E / forward_8E.clamp(min=_CLOSE)
    behind_E = forward_8E.amin(0) < _CLOSE
    close = torch.where(behind_E, across_28E / _CLOSE, at)  # its edges may leave the picture
    scale_E, size_2E = (size_2V[0] / 2 / slope_V)[view_E], size_2V[:, view_E]
    least_2E = torch.minimum(at, close).amin(1) * scale_E + size_2E / 2
    most_2E = torch.maximum(at, close).amax(1) * scale_E + size_2E / 2
    low, high = (torch.minimum(each.clamp(min=0), size_2E).long() for each in (least_2E.floor(), most_2E.ceil()))
    seen = ((forward_8E.amax(0) > _CLOSE) & (high > low).all(0)).nonzero()[:, 0]
    return view_E[seen], pose_E[seen], box_E[seen], low[:, seen], high[:, seen]


def _ground(around: Around, poses_K3: Tensor) -> Tensor:
    """The colour of ground and sky in every pixel, ``[3, K, M]``; coarser where a pixel covers more metres."""
    scenery, layout = around.scenery, around.layout
    turned_2K1 = torch.stack([poses_K3[:, 2].cos(), poses_K3[:, 2].sin()])[..., None]
    at_2KM = _turn(scenery.flat_2M[:, None], turned_2K1)
    for view, part in zip(scenery.rig.views, scenery.rig.pixels.parts, strict=True):
        at_2KM[:, :, part] += poses_K3.T[:2, :, None] + _turn(view.place_3[:2, None, None], turned_2K1)
    corner = layout.corner_2.to(at_2KM)[:, None, None]
    at_2KM.sub_(corner).div_(METRES * 2.0**scenery.level_M).floor_()
    column, row = torch.minimum(at_2KM, around.ends_2M[:, None]).clamp_(min=-1).int()
    texel = row.mul_(around.columns_M).add_(column).add_(around.first_M)
    packed = layout.texels[0].index_select(0, texel.flatten()).view_as(texel)
    shifts = torch.tensor([0, 8, 16], dtype=torch.int32, device=packed.device)
    colour = (packed >> shifts[:, None, None]).bitwise_and_(255).float().div_(255)
    colour = torch.lerp(colour, _horizon(colour), scenery.fog_M).mul_(2).sub_(1)
    return torch.lerp(scenery.sky_3M[:, None], colour, scenery.ground_M)


def _fog(depth: Tensor) -> Tensor:
    """The share of the horizon's colour in that of things at these distances."""
    return ((depth - FOG[0]) / (FOG[1] - FOG[0])).clamp(0, 1)


def _horizon(like: Tensor) -> Tensor:
    """The horizon's colour, for colours ``[3, *]``."""
    return like.new_tensor(HORIZON).view(3, *[1] * (like.dim() - 1))


def _brightness(heading_2W: Tensor, axis_W: Tensor, below_W: Tensor) -> Tensor:
    """The renderer's shade of faces ``[W]``: of the lower or the upper face along an axis of a box."""
    ahead, left = heading_2W
    x, y, z = SUN
    facing_3W = torch.stack([ahead * x + left * y, -left * x + ahead * y, torch.full_like(ahead, z)])
    facing = facing_3W.gather(0, axis_W[None])[0] * (1 - 2 * below_W.float())
    along, towards, away = SHADE
    return along + torch.where(facing > 0, towards, away) * facing


def _turn(points: Tensor, turned: Tensor) -> Tensor:
    """Points ``[2, *]`` turned by angles, whose cosine and sine ``turned [2, *]`` holds."""
    (x, y), (cos, sin) = points, turned
    return torch.stack([x * cos - y * sin, x * sin + y * cos])

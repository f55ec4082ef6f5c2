"""A layout as the cameras of a moving ego see it: how far away everything is, what it is, and its rough colour.

Shape suffixes: K poses, M pixels of a camera, N boxes near the ego, E pairs of a pose and a box that is in the picture,
X pixels that these boxes may cover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdover_world.conditioning.views import View
from holdover_world.scene.cameras import camera_rays
from holdover_world.scene.depth import FAR
from holdover_world.scene.layout import METRES, Layout
from holdover_world.scene.palette import FOG, GROUNDS, HORIZON, SHADE, SUN, ZENITH

_EVERY = 2  # side in pixels of the squares for which boxes are searched
_REACH = 170.0  # metres within which boxes are searched
_CLOSE = 0.2  # metres before a camera; whatever is nearer counts as behind it
SKY, GROUND = 0, 1


@dataclass(frozen=True)
class Drawn:
    """What a camera sees at K poses, per pixel.

    Attributes:
        depth_KM: metres along the viewing axis.
        what_KM: the face of a box, by a number that is the same for all poses; or `SKY`, or `GROUND`.
        car_KM: the number of the car; -1 where there is none.
        colour_3KM: the colour, from -1 to 1.
    """

    depth_KM: Tensor
    what_KM: Tensor
    car_KM: Tensor
    colour_3KM: Tensor


@dataclass(frozen=True)
class Around:
    """The boxes around an ego at K poses.

    Attributes:
        poses_K3: the poses, in the layout's coordinates.
        boxes_KN10: the boxes at each pose, with the columns of `Layout.boxes_M10`.
        car_N: the number of the car that a box belongs to; -1 for boxes that stand still.
    """

    poses_K3: Tensor
    boxes_KN10: Tensor
    car_N: Tensor

    @classmethod
    def of(cls, layout: Layout, poses_K3: Tensor, frames: Sequence[int]) -> Around:
        """The boxes near these poses, with the cars where the log has them.

        Args:
            poses_K3: the poses, in the layout's coordinates.
            frames: the video frame of the log at each pose.
        """
        centre = poses_K3[:, :2].mean(0)
        spread = (poses_K3[:, :2] - centre).norm(dim=1).amax() + _REACH
        near = (layout.boxes_M10[:, :2] - centre).norm(dim=1) < spread
        standing = layout.boxes_M10[near]
        car_J = layout.parts_J10[:, 0].long()
        cars_KJ3 = layout.cars(frames)[:, car_J]
        close = ((cars_KJ3[..., :2] - centre).norm(dim=-1) < spread).any(0)
        car_J, cars_KJ3, parts = car_J[close], cars_KJ3[:, close], layout.parts_J10[close]
        heading = cars_KJ3[..., 2:]
        ahead = parts[:, 1:2] * torch.cat([heading.cos(), heading.sin()], -1)
        sizes = parts[:, 3:].expand(len(poses_K3), -1, -1)
        moving = torch.cat([cars_KJ3[..., :2] + ahead, heading, sizes], -1)
        boxes = torch.cat([standing.expand(len(poses_K3), -1, -1), moving], 1)
        nobody = car_J.new_full((len(standing),), -1)
        return cls(poses_K3, boxes, torch.cat([nobody, car_J]))


def draw(layout: Layout, view: View, around: Around) -> Drawn:
    """What one camera sees."""
    camera, poses = view.camera, around.poses_K3
    turned = torch.stack([poses[:, 2].cos(), poses[:, 2].sin()], -1)
    place_K3 = torch.cat([poses[:, :2] + _turn(view.place_3[:2], turned), view.place_3[2:].expand(len(poses), 1)], -1)
    depth, what, car, colour = _boxes(view, around, place_K3, turned)
    depth, what, car = (_finer(x, view) for x in (depth, what, car))
    colour = torch.stack([_finer(c, view) for c in colour])
    rays_3M, ground_M = view.pixels
    directions_M3 = (view.axes_33.T @ rays_3M).T
    nothing = what == SKY
    there = nothing & (ground_M < FAR)
    depth = torch.where(nothing, ground_M, depth)
    what = torch.where(there, GROUND, what)
    flat_KM2 = place_K3[:, None, :2] + _turn(directions_M3[:, :2] * ground_M[:, None], turned[:, None])
    focal = camera.width / 2 / view.slope
    below = _ground_colour(layout, flat_KM2, ground_M / focal)
    colour = torch.where(there, below, colour)
    fog = ((depth - FOG[0]) / (FOG[1] - FOG[0])).clamp(0, 1)
    horizon = colour.new_tensor(HORIZON)[:, None, None]
    colour = torch.lerp(colour, horizon, fog)
    up_M = (directions_M3[:, 2] / directions_M3.norm(dim=1)).clamp(min=0)
    sky_3M = torch.lerp(horizon[:, 0], colour.new_tensor(ZENITH)[:, None], up_M**0.7)
    colour = torch.where(what == SKY, sky_3M[:, None], colour)
    return Drawn(depth, what, car, 2 * colour - 1)


def _boxes(view: View, around: Around, place_K3: Tensor, turned_K2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depth, face, car and colour of the nearest box per square of pixels, ``[K, m]``; `SKY` where there is none."""
    camera = view.camera
    columns, rows = math.ceil(camera.width / _EVERY), math.ceil(camera.height / _EVERY)
    count, squares = len(place_K3), rows * columns
    depth = place_K3.new_full((count * squares,), FAR)
    what = torch.full_like(depth, SKY, dtype=torch.long)
    car, colour = torch.full_like(what, -1), depth.new_zeros(3, len(depth))
    pose_E, box_E, low, high = _rectangles(view, around, place_K3, turned_K2, rows, columns)
    width, height = (high - low).unbind(-1)
    area = width * height
    if not int(area.sum()):
        return depth.view(count, -1), what.view(count, -1), car.view(count, -1), colour.unflatten(1, (count, -1))
    # Each box that is in a picture, at each square of the rectangle around it.
    pair = torch.repeat_interleave(area)
    offset = torch.arange(len(pair), device=pair.device) - (area.cumsum(0) - area)[pair]
    square = (low[pair, 1] + offset // width[pair]) * columns + low[pair, 0] + offset % width[pair]
    rays_m3 = torch.from_numpy(camera_rays(camera, every=_EVERY)).to(depth).flatten(0, 1)
    boxes_E = around.boxes_KN10[pose_E, box_E]
    heading = torch.stack([boxes_E[:, 2].cos(), boxes_E[:, 2].sin()], -1)
    # The camera and the rays in the coordinates of each box.
    beside = place_K3[pose_E] - torch.cat([boxes_E[:, :2], boxes_E[:, 5:7].mean(1, keepdim=True)], -1)
    own = torch.cat([_turn(beside[:, :2], heading * heading.new_tensor([1, -1])), beside[:, 2:]], -1)
    half = torch.cat([boxes_E[:, 3:5], (boxes_E[:, 6:7] - boxes_E[:, 5:6]) / 2], -1)
    relative = _turn(turned_K2[pose_E], heading * heading.new_tensor([1, -1]))
    ray_X3 = rays_m3[square]
    own_ray = torch.cat([_turn(ray_X3[:, :2], relative[pair]), ray_X3[:, 2:]], -1)
    own_ray = torch.where(own_ray.abs() < 1e-6, 1e-6, own_ray)
    middle, reach = -own[pair] / own_ray, half[pair] / own_ray.abs()
    enters, axis = (middle - reach).max(-1)
    leaves = (middle + reach).amin(-1)
    hit = (enters < leaves) & (enters > _CLOSE)
    pair, square, axis, enters = pair[hit], square[hit], axis[hit], enters[hit]
    from_below = own_ray[hit].gather(1, axis[:, None])[:, 0] > 0
    where = pose_E[pair] * squares + square
    depth.scatter_reduce_(0, where, enters, "amin")
    nearest = (enters == depth[where]).nonzero()[:, 0]
    # Of faces in one plane the last one counts. Plain writes would leave the choice to the order of the threads.
    last = torch.full_like(what, -1).scatter_reduce_(0, where[nearest], nearest, "amax")
    where = (last >= 0).nonzero()[:, 0]
    seen = last[where]
    pair, axis, from_below = pair[seen], axis[seen], from_below[seen]
    what[where] = 2 + 6 * box_E[pair] + 2 * axis + from_below
    car[where] = around.car_N[box_E[pair]]
    bright = torch.stack([_brightness(heading, n, below) for n in range(3) for below in (False, True)], -1)
    colour[:, where] = (boxes_E[pair, 7:] * bright[pair, 2 * axis + from_below, None]).T.clamp(max=1)
    return depth.view(count, -1), what.view(count, -1), car.view(count, -1), colour.unflatten(1, (count, -1))


def _rectangles(
    view: View, around: Around, place_K3: Tensor, turned_K2: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pose and box of each pair that is in a picture, ``[E]``, and its first and last column and row ``[E, 2]``."""
    boxes, back = around.boxes_KN10, turned_K2 * turned_K2.new_tensor([1, -1])
    middle = _turn(boxes[..., :2] - place_K3[:, None, :2], back[:, None])
    heading = _turn(torch.stack([boxes[..., 2].cos(), boxes[..., 2].sin()], -1), back[:, None])
    corners = []
    for ahead, beside in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        flat = middle + _turn(torch.stack([ahead * boxes[..., 3], beside * boxes[..., 4]], -1), heading)
        corners += [torch.cat([flat, boxes[..., z : z + 1] - place_K3[:, None, 2:]], -1) for z in (5, 6)]
    right, down, forward = (torch.stack(corners, 2) @ view.axes_33.T).unbind(-1)
    in_front = forward.amax(-1) > _CLOSE
    behind = forward.amin(-1) < _CLOSE
    bounds: list[tuple[Tensor, Tensor]] = []
    for across, size in ((right, columns), (down, rows)):
        at = across / forward.clamp(min=_CLOSE)
        close = torch.where(behind[..., None], across / _CLOSE, at)  # its edges may leave the picture
        scale = columns / 2 / view.slope
        least = torch.minimum(at, close).amin(-1) * scale + size / 2
        most = torch.maximum(at, close).amax(-1) * scale + size / 2
        bounds.append((least.floor().clamp(0, size).long(), most.ceil().clamp(0, size).long()))
    (left, right_end), (top, bottom) = bounds
    pose_E, box_E = (in_front & (right_end > left) & (bottom > top)).nonzero(as_tuple=True)
    low = torch.stack([left, top], -1)[pose_E, box_E]
    high = torch.stack([right_end, bottom], -1)[pose_E, box_E]
    return pose_E, box_E, low, high


def _ground_colour(layout: Layout, at_KM2: Tensor, metres_M: Tensor) -> Tensor:
    """The colour of the ground at these points, ``[3, K, M]``; coarser where a pixel covers more metres."""
    found = at_KM2.new_tensor(GROUNDS["grass"])[:, None, None].expand(-1, *at_KM2.shape[:2]).clone()
    level_M = (metres_M / METRES).clamp(min=1).log2().ceil().long().clamp(max=len(layout.levels) - 1)
    for n, colours in enumerate(layout.levels):
        own = (level_M == n).nonzero()[:, 0]
        column, row = ((at_KM2[:, own] - layout.corner_2.to(at_KM2)) / (METRES * 2**n)).floor().long().unbind(-1)
        inside = (column >= 0) & (row >= 0) & (column < colours.shape[1]) & (row < colours.shape[0])
        k, m = inside.nonzero(as_tuple=True)
        found[:, k, own[m]] = colours[row[inside], column[inside]].T.to(found.dtype) / 255
    return found


def _brightness(heading_E2: Tensor, axis: int, from_below: bool) -> Tensor:
    """The renderer's shade of one face of each box, ``[E]``: the lower or the upper face along an axis."""
    sign = -1.0 if from_below else 1.0
    if axis == 2:
        facing = heading_E2.new_full((len(heading_E2),), sign * SUN[2])
    else:
        turn = heading_E2 if axis == 0 else torch.stack([-heading_E2[:, 1], heading_E2[:, 0]], -1)
        facing = sign * (turn * turn.new_tensor(SUN[:2])).sum(-1)
    along, towards, away = SHADE
    return along + torch.where(facing > 0, towards, away) * facing


def _turn(points: Tensor, turned: Tensor) -> Tensor:
    """Points ``[*, 2]`` turned by angles, whose cosine and sine ``turned [*, 2]`` holds."""
    (x, y), (cos, sin) = points.unbind(-1), turned.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1)


def _finer(squares_KM: Tensor, view: View) -> Tensor:
    """Values of squares as values of their pixels."""
    columns = math.ceil(view.camera.width / _EVERY)
    grid: Tensor = squares_KM.unflatten(1, (-1, columns)).repeat_interleave(_EVERY, 1).repeat_interleave(_EVERY, 2)
    return grid[:, : view.camera.height, : view.camera.width].flatten(1)

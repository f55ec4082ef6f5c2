"""Poses on the ground, (x, y, yaw), in one another's coordinates: metres and radians.

Shape suffixes: B batch, K poses.
"""

from __future__ import annotations

import torch
from torch import Tensor


def placed(origin_B3: Tensor | None, poses_BK3: Tensor) -> Tensor:
    """Poses given in the coordinates of ``origin``, in the coordinates that ``origin`` is given in.

    Without an origin the two are the same.
    """
    if origin_B3 is None:
        return poses_BK3
    x, y, yaw = (each[:, None] for each in origin_B3.unbind(-1))
    cos, sin = yaw.cos(), yaw.sin()
    ahead, left, turn = poses_BK3.unbind(-1)
    return torch.stack([x + ahead * cos - left * sin, y + ahead * sin + left * cos, yaw + turn], -1)


def seen_from(origin: Tensor, poses: Tensor) -> Tensor:
    """The reverse of `placed`: poses in the coordinates of ``origin``, ``[*, 3]`` each."""
    x, y, turn = (poses - origin).unbind(-1)
    cos, sin = origin[..., 2].cos(), origin[..., 2].sin()
    return torch.stack([x * cos + y * sin, y * cos - x * sin, turn], -1)

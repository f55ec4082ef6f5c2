"""Optical flow over a token grid: moves held tokens along with the picture.

Shape suffixes: B batch, L tokens, M pictures (batch, frame and view), H rows, W columns, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from holdover.slot import ViewGroup, check_grids, join_views, split_views

#: Tokens per side of the window in which Lucas and Kanade take the flow to be one, at half resolution.
WINDOW = 5

#: Share of a picture's mean squared gradient that is added to the window's, so that plain surfaces stand still.
DAMPING = 1e-2


@dataclass(frozen=True)
class Warp:
    """Warps tokens by the flow between two inputs (arXiv 2603.22286, OFA; Lucas and Kanade 1981), in float32.

    The flow is that of the channel means at half resolution.

    Attributes:
        groups: the token grids; tokens are ordered frame, group, view, row, column.
    """

    groups: tuple[ViewGroup, ...]

    def __post_init__(self) -> None:
        check_grids("warp", self.groups)

    def picture(self, x: Tensor) -> Tensor:
        """What the flow is read from, ``[B, L]``."""
        return x.detach().float().mean(-1).flatten(1)

    def along(self, then_BL: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that moves tokens from where they were in the picture ``then_BL`` to where they are in ``x``.

        Raises:
            ValueError: the tokens are not whole frames of the groups.
        """
        now_BL = self.picture(x)
        flows = [
            lucas_kanade(then_MHW1[..., 0], now_MHW1[..., 0])
            for then_MHW1, now_MHW1 in zip(
                split_views(then_BL[..., None], self.groups), split_views(now_BL[..., None], self.groups), strict=True
            )
        ]

        def move(tokens: Tensor) -> Tensor:
            pieces = split_views(tokens.reshape(*now_BL.shape, -1), self.groups)
            moved = [sample(piece, flow) for piece, flow in zip(pieces, flows, strict=True)]
            return join_views(moved, self.groups, now_BL.shape[0]).reshape(tokens.shape).to(tokens.dtype)

        return move


def lucas_kanade(then_MHW: Tensor, now_MHW: Tensor) -> Tensor:
    """Where each token of ``now`` was: rows and columns to add to its place, ``[M, H, W, 2]``."""
    half_then, half_now = (
        F.avg_pool2d(picture[:, None], 2, ceil_mode=True, count_include_pad=False) for picture in (then_MHW, now_MHW)
    )
    padded = F.pad(half_then, (1, 1, 1, 1), mode="replicate")
    down = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    right = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    change = half_now - half_then
    products = torch.cat([down * down, right * right, down * right, down * change, right * change], 1)
    sums = F.avg_pool2d(products, WINDOW, 1, WINDOW // 2)
    dd, rr, dr, dc, rc = sums.unbind(1)
    damping = DAMPING * (down * down + right * right).mean((1, 2, 3))[:, None, None] + torch.finfo(torch.float32).tiny
    dd, rr = dd + damping, rr + damping
    determinant = (dd * rr - dr * dr).clamp_min(torch.finfo(torch.float32).tiny)
    flow = torch.stack([rr * dc - dr * rc, dd * rc - dr * dc], 1) / determinant[:, None]
    full = F.interpolate(flow, then_MHW.shape[1:], mode="bilinear", align_corners=False) * 2
    return full.movedim(1, -1)


def sample(x_MHWC: Tensor, flow_MHW2: Tensor) -> Tensor:
    """``x`` at each place plus the flow, bilinear, from the border where that lies outside; no flow changes no bit."""
    m, h, w, _ = x_MHWC.shape
    rows = (torch.arange(h, device=x_MHWC.device)[:, None] + flow_MHW2[..., 0]).clamp(0, h - 1)
    columns = (torch.arange(w, device=x_MHWC.device) + flow_MHW2[..., 1]).clamp(0, w - 1)
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    at, near_row, near_column = torch.arange(m, device=x_MHWC.device)[:, None, None], _index(top), _index(left)
    far_row, far_column = (near_row + 1).clamp_max(h - 1), (near_column + 1).clamp_max(w - 1)
    upper = x_MHWC[at, near_row, near_column] * (1 - right) + x_MHWC[at, near_row, far_column] * right
    lower = x_MHWC[at, far_row, near_column] * (1 - right) + x_MHWC[at, far_row, far_column] * right
    return upper * (1 - down) + lower * down


def _index(places: Tensor) -> Tensor:
    """As whole numbers; what is not finite becomes the border."""
    return places.nan_to_num(0).long()

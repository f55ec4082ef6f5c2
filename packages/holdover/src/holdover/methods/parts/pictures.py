"""Tokens as pictures.

Shape suffixes: B batch, F latent frames, N tokens per frame, L tokens, M pictures (batch, frame and view), H rows,
W columns, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdover.engine.slots import ViewGroup


def check_grids(name: str, groups: Sequence[ViewGroup]) -> None:
    """Raise a ValueError unless an option holds token grids."""
    if not all(isinstance(group, ViewGroup) for group in groups):
        raise ValueError(f"{name}={groups!r} holds what is no token grid; give holdover.ViewGroup objects")


def split(x_BLC: Tensor, groups: Sequence[ViewGroup]) -> list[Tensor]:
    """Per group ``[M, H, W, C]``; tokens are ordered frame, group, view, row, column.

    Raises:
        ValueError: the tokens are not whole frames of the groups.
    """
    b, length, c = x_BLC.shape
    per_frame = sum(group.tokens for group in groups)
    if length % per_frame:
        raise ValueError(f"{length} tokens are not whole frames of the {per_frame} tokens of the given grids")
    x_BFNC = x_BLC.reshape(b, length // per_frame, per_frame, c)
    parts = torch.split(x_BFNC, [group.tokens for group in groups], 2)
    return [part.reshape(-1, g.height, g.width, c) for part, g in zip(parts, groups, strict=True)]


def join(parts: Sequence[Tensor], groups: Sequence[ViewGroup], b: int) -> Tensor:
    """The reverse of `split`, ``[B, L, C]``."""
    joined = [p.reshape(b, -1, g.tokens, p.shape[-1]) for p, g in zip(parts, groups, strict=True)]
    return torch.cat(joined, 2).flatten(1, 2)

"""A model's output as tokens: which axis holds the channels, how large a token is, which modality a channel is of.

Shape suffixes: B batch, L tokens, C channels of a token, M modalities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Turns an output into tokens ``[B, L, C]``, and back.

    Attributes:
        channels: the axis that holds the channels; 0 is the batch. None is the last one of an output ``[B, L, C]``.
            An output ``[L, C]`` is one of a batch of one.
        patch: the size of a token along each of the other axes but the batch, such as ``(1, 2, 2)`` for frames, rows
            and columns; one latent pixel if empty.
        modalities: how many channels each modality has, such as ``(16, 16, 24)``. Each place then has a token of every
            modality; the tokens of one modality come before those of the next. Empty: all channels are one token's.
    """

    channels: int | None = None
    patch: tuple[int, ...] = ()
    modalities: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.channels is not None and (not isinstance(self.channels, int) or self.channels == 0):
            raise ValueError(f"channels={self.channels!r}: give the axis of the channels, such as 1; 0 is the batch")
        for name, sizes in (("patch", self.patch), ("modality_channels", self.modalities)):
            if not all(isinstance(size, int) and size > 0 for size in sizes):
                raise ValueError(f"{name}={sizes}: give whole numbers, 1 or more")

    def split(self, y: Tensor) -> Tensor:
        """The tokens of an output. Where modalities differ in channels, the shorter tokens end in zeros."""
        shape, axis, patch = self.check(y.shape)
        last = y.reshape(shape).movedim(axis, -1)
        sizes = [part for size, p in zip(last.shape[1:-1], patch, strict=True) for part in (size // p, p)]
        cut = last.reshape(shape[0], *sizes, shape[axis])
        grid, within = range(1, cut.dim() - 1, 2), range(2, cut.dim() - 1, 2)
        cut = cut.permute(0, *grid, *within, -1).flatten(1, len(patch))
        if not self.modalities:
            return cut.flatten(2)
        parts = [part.flatten(2) for part in cut.split(self.modalities, -1)]
        widest = max(part.shape[-1] for part in parts)
        return torch.cat([F.pad(part, (0, widest - part.shape[-1])) for part in parts], 1)

    def join(self, tokens_BLC: Tensor, like: torch.Size) -> Tensor:
        """The reverse of `split`: an output of the shape ``like``."""
        shape, axis, patch = self.check(like)
        others = [size for n, size in enumerate(shape) if n not in (0, axis)]
        grid = [size // p for size, p in zip(others, patch, strict=True)]
        widths, volume = self.modalities or (shape[axis],), math.prod(patch)
        parts = [
            part[..., : volume * width].reshape(shape[0], *grid, *patch, width)
            for part, width in zip(tokens_BLC.split(math.prod(grid), 1), widths, strict=True)
        ]
        order = [n for axis in range(1, len(grid) + 1) for n in (axis, axis + len(grid))]
        last = torch.cat(parts, -1).permute(0, *order, -1).reshape(shape[0], *others, shape[axis])
        return last.movedim(-1, axis).reshape(like)

    def check(self, given: torch.Size) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        """The shape with a batch, the axis of the channels, and the size of a token along each of the others.

        Raises:
            ValueError: an output of this shape does not fit the layout, or has more axes than ``[B, L, C]`` and its
                channels are not named.
        """
        shape = tuple(given) if len(given) > 2 else (1, *given)
        if self.channels is None and len(shape) > 3:
            raise ValueError(
                f"the output is {list(shape)}: which axis holds its channels? Give channels=1 for [B, C, F, H, W], "
                f"channels=2 for [B, F, C, H, W]; patch and modality_channels say what a token is"
            )
        axis = -1 if self.channels is None else self.channels
        if not -len(shape) < axis < len(shape):
            raise ValueError(f"channels={axis} is no axis of the output {list(shape)}, whose first is the batch")
        axis %= len(shape)
        others = [size for n, size in enumerate(shape) if n not in (0, axis)]
        patch = self.patch or (1,) * len(others)
        if len(patch) != len(others) or any(size % p for size, p in zip(others, patch, strict=True)):
            raise ValueError(f"patch={patch} does not divide the axes {others} of the output {list(shape)}")
        if self.modalities and sum(self.modalities) != shape[axis]:
            raise ValueError(
                f"modality_channels={self.modalities} are {sum(self.modalities)} channels, the output {list(shape)} "
                f"has {shape[axis]}"
            )
        return shape, axis, patch

"""Rotary position embedding (Su et al., arXiv 2104.09864) over time, rows and columns, and over viewing directions.

Shape suffixes: S tokens of an attention sequence, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from holdover_world.config import WorldConfig, token_rays

Table = tuple[Tensor, Tensor]


def rotary_table(positions: Tensor, frequencies: Sequence[Tensor]) -> Table:
    """Cosine and signed sine ``[S, D]``: column ``a`` of ``positions [S, axes]`` turns at ``frequencies[a]``."""
    angles = torch.cat([positions[:, i : i + 1] * f.to(positions) for i, f in enumerate(frequencies)], 1)
    return torch.cat([angles, angles], 1).cos(), torch.cat([-angles, angles], 1).sin()


def rotate(x: Tensor, table: Table) -> Tensor:
    """Apply a `rotary_table` to ``x [..., S, D]``."""
    cos, sin = table
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([second, first], -1), sin)


class RotaryTables:
    """The tables of one model, each made at its first use."""

    def __init__(self, config: WorldConfig) -> None:
        self._config = config
        self._half = config.channels // config.heads // 2
        self._tables: dict[tuple[Any, ...], Any] = {}

    def temporal(
        self, starts: Sequence[int], frames: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Table, ...]:
        """One table per group of cameras, over time, row and column; per row of the batch if their starts differ.

        Args:
            starts: per row, the time of the first latent frame.
            frames: the number of latent frames.
        """
        rows = [self._from(start, frames, device, dtype) for start in starts]
        if len(set(starts)) == 1:
            return rows[0]
        groups = zip(*rows, strict=True)
        return tuple((torch.stack([c for c, _ in g]), torch.stack([s for _, s in g])) for g in map(list, groups))

    def cross(self, device: torch.device, dtype: torch.dtype) -> Table:
        """The table over viewing directions. Whole azimuth frequencies close the circle."""
        key = ("view", device, dtype)
        if key not in self._tables:
            quarter = self._half // 4
            azimuth = torch.linspace(1, 24, self._half - quarter).round()
            elevation = torch.linspace(1, 24, quarter)
            x, y, up = torch.from_numpy(token_rays(self._config))[:, :3].unbind(1)
            directions = torch.stack([torch.atan2(y, x), torch.atan2(up, torch.hypot(x, y))], 1)
            cos, sin = rotary_table(directions, [azimuth, elevation])
            self._tables[key] = cos.to(device, dtype), sin.to(device, dtype)
        table: Table = self._tables[key]
        return table

    def _from(self, start: int, frames: int, device: torch.device, dtype: torch.dtype) -> tuple[Table, ...]:
        key = ("time", start, frames, device, dtype)
        if key not in self._tables:
            if len(self._tables) > 64:  # a long video must not fill the memory with tables
                self._tables.clear()
            quarter = self._half // 4
            frequencies = [
                0.5 ** torch.linspace(0, 5, self._half - 2 * quarter),  # periods from 2 pi to 200 latent frames
                0.5 ** torch.linspace(0, 5, quarter),
                0.5 ** torch.linspace(0, 5, quarter),
            ]
            tables = []
            for cameras in self._config.groups:
                # In every modality rows and columns count in tokens of colour, so that tokens at one place agree.
                places = []
                for modality in self._config.modalities:
                    ratio = self._config.token_latents(modality) / self._config.patch
                    axes = (torch.arange(n) * ratio + (ratio - 1) / 2 for n in self._config.grid(cameras[0], modality))
                    places.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2))
                place = torch.cat(places)
                time = torch.arange(start, start + frames, dtype=torch.float32).repeat_interleave(len(place))
                cos, sin = rotary_table(torch.cat([time[:, None], place.repeat(frames, 1)], 1), frequencies)
                tables.append((cos.to(device, dtype), sin.to(device, dtype)))
            self._tables[key] = tuple(tables)
        found: tuple[Table, ...] = self._tables[key]
        return found

"""Rotary position embedding (Su et al., arXiv 2104.09864) over time, rows and columns, and over viewing directions.

Shape suffixes: B batch, F latent frames, N tokens of one latent frame, S tokens of an attention sequence, D channels of
a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdover_world.config import WorldConfig, token_rays

Table = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TemporalOrder:
    """The tokens of a latent frame in the order of temporal attention: group, view, modality, row, column.

    Attributes:
        tokens_N: which token is at each place.
        places_N: at which place each token is.
        groups: per group of cameras its places, and how many cameras share them.
    """

    tokens_N: Tensor
    places_N: Tensor
    groups: tuple[tuple[slice, int], ...]


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

    def order(self, device: torch.device) -> TemporalOrder:
        """The order of the tokens in temporal attention."""
        key = ("order", device)
        if key not in self._tables:
            tokens, groups, end = [], [], 0
            for cameras in self._config.groups:
                planes = [plane for camera in cameras for plane in self._config.planes if plane.camera == camera]
                tokens += [torch.arange(plane.tokens.start, plane.tokens.stop) for plane in planes]
                start, end = end, sum(map(len, tokens))
                groups.append((slice(start, end), len(cameras)))
            tokens_N = torch.cat(tokens)
            self._tables[key] = TemporalOrder(tokens_N.to(device), tokens_N.argsort().to(device), tuple(groups))
        order: TemporalOrder = self._tables[key]
        return order

    def temporal(self, starts: Sequence[int], frames: int, device: torch.device, dtype: torch.dtype) -> Table:
        """The table over time, row and column, ``[F, N, 1, 1, D]`` in the order of temporal attention.

        Per row of the batch, ``[B, F, N, 1, 1, D]``, if their starts differ.

        Args:
            starts: per row, the time of the first latent frame.
            frames: the number of latent frames.
        """
        rows = [self._from(start, frames, device, dtype) for start in starts]
        if len(set(starts)) == 1:
            return rows[0]
        return torch.stack([cos for cos, _ in rows]), torch.stack([sin for _, sin in rows])

    def cross(self, device: torch.device, dtype: torch.dtype) -> Table:
        """The table over viewing directions, ``[N, 1, 1, D]``. Whole azimuth frequencies close the circle."""
        key = ("view", device, dtype)
        if key not in self._tables:
            quarter = self._half // 4
            azimuth = torch.linspace(1, 24, self._half - quarter).round()
            elevation = torch.linspace(1, 24, quarter)
            x, y, up = torch.from_numpy(token_rays(self._config))[:, :3].unbind(1)
            directions = torch.stack([torch.atan2(y, x), torch.atan2(up, torch.hypot(x, y))], 1)
            cos, sin = rotary_table(directions, [azimuth, elevation])
            self._tables[key] = tuple(t.to(device, dtype)[:, None, None] for t in (cos, sin))
        table: Table = self._tables[key]
        return table

    def _from(self, start: int, frames: int, device: torch.device, dtype: torch.dtype) -> Table:
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
            # In every modality rows and columns count in tokens of colour, so that tokens at one place agree.
            places = []
            for plane in self._config.planes:
                ratio = self._config.token_latents(plane.modality) / self._config.patch
                axes = (torch.arange(n) * ratio + (ratio - 1) / 2 for n in (plane.rows, plane.columns))
                places.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2))
            place_N2 = torch.cat(places)[self.order(torch.device("cpu")).tokens_N]
            time = torch.arange(start, start + frames, dtype=torch.float32).repeat_interleave(len(place_N2))
            tables = rotary_table(torch.cat([time[:, None], place_N2.repeat(frames, 1)], 1), frequencies)
            self._tables[key] = tuple(t.to(device, dtype).view(frames, -1, 1, 1, 2 * self._half) for t in tables)
        found: Table = self._tables[key]
        return found

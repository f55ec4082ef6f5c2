"""The ground of a layout at four levels, against means of its squares."""

from __future__ import annotations

import torch

from holdover_world.scene.layout import Layout
from holdover_world.scene.palette import GROUNDS


def test_levels_are_means_of_four_squares_and_grass_is_around_them() -> None:
    ground = torch.randint(0, len(GROUNDS), (13, 22), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    nothing = torch.zeros(0, 10)
    layout = Layout(ground, torch.zeros(2), nothing, nothing, torch.zeros(1, 0, 3))
    texels, sizes = layout.texels
    colours = [[round(255 * share) for share in colour] for colour in GROUNDS.values()]
    level = [[colours[kind] for kind in row] for row in ground.tolist()]
    assert len(sizes) == Layout.LEVELS
    for rows, columns, first in sizes.tolist():
        assert (rows, columns) == (len(level), len(level[0]))
        for r in range(-1, rows + 1):
            for c in range(-1, columns + 1):
                texel = int(texels[first + (r + 1) * (columns + 2) + c + 1])
                inside = 0 <= r < rows and 0 <= c < columns
                assert [texel & 255, texel >> 8 & 255, texel >> 16] == (level[r][c] if inside else colours[0])
        level = [
            [
                [round(sum(level[2 * r + i][2 * c + j][n] for i in (0, 1) for j in (0, 1)) / 4) for n in range(3)]
                for c in range(columns // 2)
            ]
            for r in range(rows // 2)
        ]

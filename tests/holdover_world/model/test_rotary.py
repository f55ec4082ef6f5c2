"""Rotary positions against their definition."""

from __future__ import annotations

from dataclasses import replace

import torch

from holdover_world.model.rotary import RotaryTables, rotary_table, rotate
from tests.holdover_world.small import CAMERAS, small_config


def test_rotary_scores_depend_on_distance_alone() -> None:
    table = rotary_table(torch.arange(10.0)[:, None], [torch.tensor([1.0, 0.3, 0.05])])
    q, k = torch.randn(6).expand(10, 6), torch.randn(6).expand(10, 6)
    scores = rotate(q, table) @ rotate(k, table).T
    for distance in range(-3, 4):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_a_token_of_depth_stands_between_the_tokens_of_colour_that_it_covers() -> None:
    """The phases of a token of depth are the mean of those of its four tokens of colour: 3 rows stay below pi."""
    camera = replace(CAMERAS[0], width=64, height=64)
    sizes = small_config(cameras=(camera,), channels=64)
    cos, sin = RotaryTables(sizes).temporal([0], 1, torch.device("cpu"), torch.float32)
    phases = torch.complex(cos, sin).flatten(0, 3)[:, cos.shape[-1] // 2 :].angle()
    colour, depth = phases[:16].view(2, 2, 2, 2, -1), phases[16:].view(2, 2, -1)
    assert len(phases) == 16 + 4
    torch.testing.assert_close(depth, colour.mean((1, 3)))
    assert not torch.equal(depth[0, 0], depth[1, 1])

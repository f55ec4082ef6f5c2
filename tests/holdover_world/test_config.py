"""Sizes of a world model, and the tokens that follow from them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from holdover_world.config import CONFIGS, WorldConfig, config_for, token_rays
from holdover_world.scene.cameras import RIG
from holdover_world.scene.clips import open_dataset
from tests.holdover_world.small import CAMERAS, small_config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "heads=5"),
        ({"context": 3}, "context=3"),
        ({"heads": 8}, "rotary"),
        ({"patch": 3, "depth_channels": 0}, "front_wide is 48x32; give multiples of 24 pixels"),
        ({"depth_channels": 2}, r"2 \* 4\*\*2 values, a token of colour 16"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_config(**changes)


def test_cameras_of_a_group_have_one_size() -> None:
    wider = replace(CAMERAS[1], width=64)
    with pytest.raises(ValueError, match=r"group 'front' differ in size \(front_wide 48x32, front_narrow 64x32\)"):
        small_config(cameras=(CAMERAS[0], wider))
    with pytest.raises(ValueError, match="cameras is empty"):
        small_config(cameras=())


def test_neighbouring_cameras_look_where_the_rig_says() -> None:
    rays = token_rays(WorldConfig())
    for plane in WorldConfig().planes:
        x, y = rays[plane.tokens, :2].T
        middle = math.atan2(y.mean(), x.mean())
        # At the right edge a token of depth may reach beyond its camera.
        tolerance = 0.02 if plane.modality == "colour" else 0.25
        assert abs(math.remainder(middle - math.radians(plane.camera.yaw), math.tau)) < tolerance
        assert (rays[plane.tokens, 3:] == np.float32(plane.camera.position)).all()
    front = rays[WorldConfig().planes[0].tokens].reshape(4, 8, 6)
    assert (front[:, 0, 1] > front[:, -1, 1]).all()  # left is positive
    assert (front[0, :, 2] > front[-1, :, 2]).all()  # the first row is the sky
    np.testing.assert_allclose(np.linalg.norm(rays[:, :3], axis=1), 1, atol=1e-6)


def test_the_shipped_rigs_tokens() -> None:
    """By hand: tokens of colour are 16 pixels wide, tokens of depth 32."""
    sizes = WorldConfig()
    assert [(group.name, group.views, group.height, group.width) for group in sizes.view_groups] == [
        ("front", 2, 4, 8),
        ("side", 4, 3, 4),
        ("rear", 1, 3, 7),
        ("front.depth", 2, 2, 4),
        ("side.depth", 4, 2, 2),
        ("rear.depth", 1, 2, 4),
    ]
    assert sizes.tokens == 2 * 32 + 4 * 12 + 21 + 2 * 8 + 4 * 4 + 8 == 173
    assert sizes.patch_values == 48 * 4 == 12 * 16
    assert [plane.camera for plane in sizes.planes] == [*RIG, *RIG]
    assert [plane.start for plane in sizes.planes][:4] == [0, 32, 64, 76]
    assert WorldConfig.from_dict(json.loads(json.dumps(sizes.to_dict()))) == sizes
    assert replace(sizes, depth_channels=0).tokens == 133


def test_a_size_takes_the_cameras_of_a_folder(tmp_path: Path) -> None:
    open_dataset(tmp_path, CAMERAS)
    assert config_for("tiny", tmp_path) == replace(CONFIGS["tiny"], cameras=CAMERAS)
    chosen = config_for("small", tmp_path, cameras=["rear", "front_wide"], depth=False)
    assert chosen == WorldConfig(cameras=(CAMERAS[0], CAMERAS[2]), depth_channels=0)
    with pytest.raises(ValueError, match="camera 'left' is not one of front_wide, front_narrow, rear"):
        config_for("small", tmp_path, cameras=["left"])

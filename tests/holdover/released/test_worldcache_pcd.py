"""WorldCache-PCD beside its released code.

The records are of umair1221/WorldCache, commit aa8715c2786eccb7928eadae765db183e92f0e89: for Cosmos the forward that
``apply_worldcache`` puts into the network, for Wan ``worldcache_forward`` of ``infer_worldcache.py``, all modules on
but the warp. What enters, what leaves the probe and what leaves the last block were prescribed, two guidance branches
in turn. Of 33 steps with two branches, a fifth are six steps and a half.
"""

from __future__ import annotations

import pytest
import torch

import holdover
from holdover import ViewGroup
from tests.holdover.released.replay import BRANCHES, assert_replayed, record, replay, run


@pytest.mark.parametrize(
    ("name", "preset", "probe"),
    [
        ("pcd_released", "released", 2),
        ("pcd_released_batch", "released", 2),  # two videos in one batch
        ("pcd_released_code", "released-code", 2),
        ("pcd_released_wan", "released-wan", 3),
    ],
)
def test_the_preset_is_the_released_code(name: str, preset: str, probe: int) -> None:
    recorded = record(name)
    cache, outputs = replay(holdover.policy("worldcache_pcd", preset=preset), probe, recorded, BRANCHES)
    assert_replayed(cache, probe, outputs, recorded)


def test_frames_may_be_those_of_the_view_groups() -> None:
    """As in models whose hidden state is a plain sequence of tokens."""
    recorded = {
        name: value.flatten(2, -2) if value.dim() > 3 else value for name, value in record("pcd_released").items()
    }
    policy = holdover.policy("worldcache_pcd", preset="released")
    cache, outputs = replay(policy, 2, recorded, BRANCHES, view_groups=[ViewGroup("video", 1, 3, 3)])
    assert_replayed(cache, 2, outputs, recorded)


def test_a_branch_of_another_name_is_refused() -> None:
    passes = [tuple(torch.zeros(3, 1, 4, 2))]
    with pytest.raises(ValueError, match=r"branch='cfg' is not one of branches=\('cond', 'uncond'\); give"):
        run(holdover.policy("worldcache_pcd", preset="released"), 2, passes, ["cfg"])

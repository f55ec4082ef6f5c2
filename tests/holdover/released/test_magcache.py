"""MagCache on Wan beside its released code.

The record is of Zehong-Ma/MagCache, commit df81cb181776c2c61477c08e1d21f87fda1cd938: ``magcache_forward`` of
``MagCache4Wan2.1/magcache_generate.py``, with a set of ratios for each guidance branch, at 33 steps, of which a fifth
are six steps and a half. What enters the blocks and what leaves them was prescribed.
"""

from __future__ import annotations

from typing import Any

import pytest

import holdover
from tests.holdover.released.replay import BRANCHES, assert_replayed, record, replay_model


def test_the_preset_is_the_released_code() -> None:
    recorded = record("magcache_wan")
    ratios = {branch: recorded["ratios"][n::2].tolist() for n, branch in enumerate(BRANCHES)}
    policy = holdover.policy("magcache", preset="released-wan", ratios=ratios)
    cache, outputs = replay_model(policy, recorded, BRANCHES)
    assert_replayed(cache, 0, outputs, recorded)


def test_one_set_for_both_branches_decides_otherwise() -> None:
    recorded = record("magcache_wan")
    policy = holdover.policy("magcache", preset="released-wan", ratios=recorded["ratios"][::2].tolist())
    cache, _ = replay_model(policy, recorded, BRANCHES)
    assert [decision.computed for decision in cache.trace] != recorded["computed"].bool().tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ratios is empty; give one magnitude ratio per step"),
        ({"ratios": {"cond": [1.0, -0.1]}}, r"ratios=\(1.0, -0.1\) are not all positive numbers"),
    ],
)
def test_ratios_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        holdover.policy("magcache", preset="released-wan", **options)


def test_a_branch_without_ratios_is_refused() -> None:
    policy = holdover.policy("magcache", preset="released-wan", ratios={"cond": [1.0] * 33})
    with pytest.raises(ValueError, match=r"branch='uncond' is not one of branches=\('cond',\)"):
        replay_model(policy, record("magcache_wan"), BRANCHES)
    policy = holdover.policy("magcache", ratios={"cond": [1.0] * 33}, retain=0)
    with pytest.raises(ValueError, match="magcache has no ratios of branch 'uncond', only of cond"):
        replay_model(policy, record("magcache_wan"), BRANCHES)

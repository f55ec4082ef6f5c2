"""DiCache beside its released code.

The records are of Bujiazi/DiCache, commit dd7f0de10be126d7a493376480d39cebafc7039c: ``dicache_forward`` of
``WAN2.1/run_wan_dicache.py``, ``HunyuanVideo/run_hunyuanvideo_dicache.py`` and ``FLUX/run_flux_dicache.py``, each with
its own settings. What enters, what leaves the probe and what leaves the last block were prescribed; for Wan two
guidance branches in turn, over 33 steps, of which a fifth are six steps and a half.
"""

from __future__ import annotations

import pytest

import holdover
from tests.holdover.released.replay import BRANCHES, assert_replayed, record, replay


@pytest.mark.parametrize(("model", "branches"), [("wan", BRANCHES), ("hunyuan", ("",)), ("flux", ("",))])
def test_the_preset_is_the_released_code(model: str, branches: tuple[str, ...]) -> None:
    recorded = record(f"dicache_{model}")
    cache, outputs = replay(holdover.policy("dicache", preset=model), 1, recorded, branches)
    assert_replayed(cache, 1, outputs, recorded)

"""EasyCache beside its released code.

The records are of H-EmbodVis/EasyCache, commit 51278044023e678bb4026a264b02a6721f6dd395: ``easycache_forward`` of
``EasyCache4HunyuanVideo/easycache_sample_video.py`` and of ``EasyCache4Wan2.1/easycache_generate.py``, with their own
settings. The latents that enter and the model's output were prescribed; for Wan two guidance branches in turn, which
see the same latents.
"""

from __future__ import annotations

import pytest

import holdover
from tests.holdover.released.replay import BRANCHES, assert_replayed, record, replay_model


@pytest.mark.parametrize(
    ("name", "preset", "branches"),
    [("easycache_hunyuan", "released", ("",)), ("easycache_wan", "released-wan", BRANCHES)],
)
def test_the_preset_is_the_released_code(name: str, preset: str, branches: tuple[str, ...]) -> None:
    recorded = record(name)
    cache, outputs = replay_model(holdover.policy("easycache", preset=preset), recorded, branches)
    assert_replayed(cache, 0, outputs, recorded)


def test_the_default_compares_with_the_size_of_the_latest_output() -> None:
    """The paper's reading, which decides otherwise here."""
    recorded = record("easycache_hunyuan")
    cache, _ = replay_model(holdover.policy("easycache", level="model"), recorded)
    assert [decision.computed for decision in cache.trace] != recorded["computed"].bool().tolist()

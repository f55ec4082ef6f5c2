"""WorldCache-HTC beside its released code.

The records are of FofGofx/WorldCache, commit f12d205674fc057038adb8722ec5fb1fbea7a784: the forward that
``apply_worldcache_aether_forward`` puts into a transformer, which returns ``[B, F, 56, H, W]``, and the one of
``apply_worldcache_voyager_forward`` with the model's own ``unpatchify``, which returns ``[B, C, F, H, W]``. The
backbone's output was prescribed.
"""

from __future__ import annotations

import pytest

import holdover
from tests.holdover.released.replay import assert_replayed, record, replay_model


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("htc_aether", "aether"),
        ("htc_aether_batch", "aether"),  # two videos, or guidance branches, in one batch: quantiles are pooled
        ("htc_aether_code", "aether-code"),
        ("htc_voyager", "voyager"),
        ("htc_voyager_code", "voyager-code"),
    ],
)
def test_the_preset_is_the_released_code(name: str, preset: str) -> None:
    recorded = record(name)
    cache, outputs = replay_model(holdover.policy("worldcache_htc", preset=preset), recorded)
    assert_replayed(cache, 0, outputs, recorded)


def test_the_axes_matter() -> None:
    """With another axis taken for channels, the schedule is another."""
    policy, recorded = holdover.policy("worldcache_htc", preset="voyager", channels=-1, patch=()), record("htc_voyager")
    cache, _ = replay_model(policy, recorded)
    assert [decision.computed for decision in cache.trace] != recorded["computed"].bool().tolist()

"""WorldCache-HTC beside its released code.

The records are of FofGofx/WorldCache, commit f12d205674fc057038adb8722ec5fb1fbea7a784: the forward that
``apply_worldcache_aether_forward`` puts into a transformer, which returns ``[B, F, 56, H, W]``, and the one of
``apply_worldcache_voyager_forward`` with the model's own ``unpatchify``, which returns ``[B, C, F, H, W]``. The
backbone's output was prescribed.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import holdover
from tests.holdover.released.replay import Given, assert_replayed, record


def replay(recorded: dict[str, Tensor], **options: Any) -> tuple[holdover.Cache, list[Tensor]]:
    model, outputs, steps = Given(), [], len(recorded["output"])
    with holdover.attach(model, holdover.policy("worldcache_htc", **options)) as cache:
        for index, model.given in enumerate(recorded["output"]):
            with cache.step(chunk=0, index=index, num_steps=steps):
                outputs.append(model(model.given))
    return cache, outputs


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
    cache, outputs = replay(recorded, preset=preset)
    assert_replayed(cache, 0, outputs, recorded)


def test_the_axes_matter() -> None:
    """With another axis taken for channels, the schedule is another."""
    recorded = record("htc_voyager")
    cache, _ = replay(recorded, preset="voyager", channels=-1, patch=())
    assert [decision.computed for decision in cache.trace] != recorded["computed"].bool().tolist()

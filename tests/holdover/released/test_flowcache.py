"""FlowCache beside its released code.

The record is of mikeallen39/FlowCache, commit 1fdfa57aa82287f34321ba7c06abcadc135928fc: ``ChunkWiseCache`` of
``FlowCache4MAGI-1/inference/pipeline/cache/cachereuse.py``, asked for every chunk in flight, a new one every eight
steps. The embedded input of each chunk was prescribed. It holds decisions alone: what the released code reuses is the
sampler's change of the latents.
"""

from __future__ import annotations

import holdover
from tests.holdover.released.replay import Given, record


def test_the_preset_decides_as_the_released_code() -> None:
    recorded, model = record("flowcache"), Given()
    steps = recorded["input"].shape[1]
    with holdover.attach(model, holdover.policy("flowcache", preset="released")) as cache:
        for chunk, index in zip(recorded["chunk"].tolist(), recorded["index"].tolist(), strict=True):
            model.given = recorded["input"][chunk, index]
            with cache.step(chunk=chunk, index=index, num_steps=steps):
                model(model.given)
    computed = [decision.computed for decision in cache.trace]
    # The very last pass of the last chunk, which the released code computes, is like any other here.
    assert computed[:-1] == recorded["computed"].bool().tolist()[:-1]
    assert 0 < sum(computed) < len(computed)

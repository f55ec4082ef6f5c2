from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress

import holdover
from holdover_world.config import CONFIGS
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import RIG
from lab.scale import Arrangement, decision_pattern, replay, run_scale
from tests.holdover_world.small import latents, small_model


@pytest.mark.parametrize("arrangement", ["runs", "scattered"])
@pytest.mark.parametrize(("share", "reused"), [(0.51, 61), (0.71, 85), (0.90, 108)])
def test_a_pattern_reuses_the_share_asked_for(share: float, reused: int, arrangement: Arrangement) -> None:
    """Of 4 passes of 30 blocks, 51, 71 and 90 % by hand; never the first block; in runs without gaps."""
    pattern = decision_pattern(share, 4, 30, arrangement, seed=3)
    assert pattern.sum() == reused
    assert not pattern[:, 0].any()
    edges = np.abs(np.diff(np.pad(pattern, ((0, 0), (0, 1))).astype(int), axis=1)).sum(1)
    if arrangement == "runs":
        assert (edges == 2).all()
    elif share < 0.9:
        assert (edges > 2).all()
    with pytest.raises(ValueError, match=r"share=0\.99"):
        decision_pattern(0.99, 4, 30, arrangement)


@pytest.mark.parametrize("fingerprint", [True, False])
def test_a_replay_skips_exactly_its_pattern(fingerprint: bool) -> None:
    model = small_model()
    pattern = decision_pattern(0.5, 4, model.sizes.layers, "scattered")
    actions = torch.zeros(1, model.sizes.context, 2)
    with holdover.attach(model, replay(pattern, fingerprint=fingerprint)) as cache:
        loop = ClosedLoop(model, latents(model, model.sizes.context), actions, cache=cache)
        for _ in range(3):
            loop.step(actions[0, 0])
    seen = np.zeros((2, *pattern.shape), bool)
    for decision in cache.trace:
        if decision.role == "denoise" and decision.chunk > 0:
            seen[decision.chunk - 1, decision.index, decision.block] = not decision.computed
            assert ("cosine" in decision.scores) is False
    np.testing.assert_array_equal(seen, np.stack([pattern, pattern]))


def test_the_largest_size_is_xworlds() -> None:
    """Thirty blocks, five billion weights, cameras eight times as wide; a token for every 16 x 16 pixels of colour, and
    one for every 32 x 32 of depth."""
    config = CONFIGS["xworld-5b"]
    with torch.device("meta"):
        weights = sum(p.numel() for p in WorldModel.of(config).parameters())
    assert config.layers == 30
    assert weights == pytest.approx(5e9, rel=0.1)
    sizes = [(8 * c.width, 8 * c.height) for c in RIG]
    assert config.tokens == sum((w // 16) * (h // 16) + (w // 32) * (h // 32) for w, h in sizes)


def test_the_bench_is_complete_and_consistent(tmp_path: Path) -> None:
    with Progress(disable=True) as progress:
        figures = run_scale(tmp_path, size="tiny", repeats=1, progress=progress)
        with pytest.raises(ValueError, match="'huge' is not one of tiny, small"):
            run_scale(tmp_path, size="huge", progress=progress)
    names = [row["name"] for row in figures["rows"]]
    assert names[0] == "unattached"
    assert len(names) == 13
    for row in figures["rows"][1:]:
        assert row["skip"] == pytest.approx(int(row["name"].split("%")[0]) / 100, abs=0.5 / 48)
        assert row["bytes_held"] > 0
        assert row["share_of_bound"] == pytest.approx(row["speedup"] / row["speedup_bound"])
    assert json.loads((tmp_path / "scale-tiny-cpu.json").read_text()) == figures
    assert "| 71% runs, scored |" in (tmp_path / "scale-tiny-cpu.md").read_text()

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from holdover.rollout.scenarios import NAMES, load_scenario
from holdover.world.clips import read_clip
from holdover.world.latents import unpatchify
from holdover.world.transformer import WorldModel


def test_a_scripted_scenario_is_its_clip(model: WorldModel, clips: Path) -> None:
    scenario = load_scenario("highway", model.sizes, clips=clips, generations=16)
    clip = read_clip(clips / "highway-000000", frames=48)
    assert scenario.start.shape[:2] == scenario.start_actions.shape[:2] == (1, 8)
    started = unpatchify(scenario.start, model.sizes)
    assert scenario.truth is not None
    for name, frames in clip.frames.items():
        assert np.array_equal(np.concatenate([started[name][0].numpy(), scenario.truth[name]]), frames)
    pieces = clip.actions.reshape(-1, 2, 2).mean(1)
    assert np.allclose(torch.cat([scenario.start_actions[0], scenario.actions]).numpy(), pieces)
    assert not scenario.steady


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-steady")])
def test_a_steady_scenario_has_one_action_and_no_truth(model: WorldModel, clips: Path, name: str) -> None:
    scenario = load_scenario(name, model.sizes, clips=clips, generations=100)  # longer than any clip
    assert scenario.actions.shape == (100, 2)
    assert (scenario.actions == scenario.actions[0]).all()
    assert scenario.truth is None
    speed, turn = scenario.actions[0].tolist()
    assert speed > 0.2
    assert (abs(turn) > 0.1) == (name == "uturn-steady")


def test_what_cannot_be_driven_is_said(model: WorldModel, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'town' is not one of urban, highway"):
        load_scenario("town", model.sizes, clips=clips)
    with pytest.raises(ValueError, match=r"no urban clip in .* has 216 frames"):
        load_scenario("urban", model.sizes, clips=clips, generations=100)
    with pytest.raises(ValueError, match="generations=0"):
        load_scenario("urban", model.sizes, clips=clips, generations=0)
    (tmp_path / "dataset.json").write_text((clips / "dataset.json").read_text())
    with pytest.raises(ValueError, match="record one: holdover world record --scenario urban"):
        load_scenario("urban", model.sizes, clips=tmp_path)

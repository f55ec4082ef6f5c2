from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from holdover_world.loop.scenarios import NAMES, load_scenario, shipped_clips, shipped_model
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.clips import read_clip
from tests.holdover_world.driving import CAMERAS, world_model, write_clips
from tests.holdover_world.small import small_config, small_layout, small_model


def test_a_scripted_scenario_is_its_clip(model: WorldModel, clips: Path) -> None:
    scenario = load_scenario("highway", model, clips=clips, chunks=16)
    clip = read_clip(clips / "highway-000000", depth=True, frames=96)
    assert scenario.start.shape[:2] == scenario.start_actions.shape[:2] == (1, 8)
    assert clip.depth is not None
    begun = model.codec.encode(*({name: x[:32] for name, x in each.items()} for each in (clip.frames, clip.depth)))
    assert torch.equal(scenario.start, begun)
    assert scenario.truth is not None
    assert list(scenario.truth) == list(clip.frames)
    assert all(np.array_equal(scenario.truth[name], frames[32:]) for name, frames in clip.frames.items())
    pieces = clip.actions.reshape(-1, 4, 2).mean(1)
    assert np.allclose(torch.cat([scenario.start_actions[0], scenario.actions]).numpy(), pieces)
    assert not scenario.steady
    assert torch.equal(scenario.plan(3), scenario.actions[4:])
    assert len(scenario.plan(15)) == 0


def test_a_model_of_colour_alone_starts_from_clips_without_depth(tmp_path: Path) -> None:
    write_clips(tmp_path, 4 * 9, depth=False)
    sizes = small_config(cameras=CAMERAS, window=4, depth_channels=0)
    scenario = load_scenario("urban", small_model(sizes=sizes), clips=tmp_path, chunks=1)
    assert scenario.start.shape == (1, 8, sizes.tokens, sizes.patch_values)
    with pytest.raises(FileNotFoundError, match=r"depth\.mkv is missing"):
        load_scenario("urban", world_model(), clips=tmp_path, chunks=1)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-steady")])
def test_a_steady_scenario_has_one_action_and_no_truth(model: WorldModel, clips: Path, name: str) -> None:
    scenario = load_scenario(name, model, clips=clips, chunks=100)  # longer than any clip
    assert scenario.actions.shape == (100, 2)
    assert (scenario.actions == scenario.actions[0]).all()
    assert scenario.truth is None
    speed, turn = scenario.actions[0].tolist()
    assert speed > 0.2
    assert (abs(turn) > 0.1) == (name == "uturn-steady")


def test_steady_driving_begins_on_a_road_without_bends_where_one_was_recorded(
    model: WorldModel, clips: Path, tmp_path: Path
) -> None:
    """And has the layout of that recording."""
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    shutil.copytree(folder / "highway-000000", folder / "straight-000000")
    small_layout().save(folder / "straight-000000")
    track = load_scenario("highway-steady", model, clips=folder, chunks=3).track
    assert track is not None
    assert torch.equal(track.layout.ground_GH, small_layout().ground_GH)
    poses = read_clip(folder / "straight-000000").poses
    assert np.array_equal(track.poses_T3, poses)
    assert load_scenario("highway", model, clips=folder, chunks=3).track is None
    assert load_scenario("uturn-steady", model, clips=folder, chunks=3).track is None


def test_what_cannot_be_driven_is_said(model: WorldModel, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'town' is not one of urban, highway"):
        load_scenario("town", model, clips=clips)
    with pytest.raises(ValueError, match=r"no urban clip in .* has 432 frames"):
        load_scenario("urban", model, clips=clips, chunks=100)
    with pytest.raises(ValueError, match="chunks=0"):
        load_scenario("urban", model, clips=clips, chunks=0)
    (tmp_path / "dataset.json").write_text((clips / "dataset.json").read_text())
    with pytest.raises(ValueError, match="record one: holdover world record --scenario urban"):
        load_scenario("urban", model, clips=tmp_path)


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "holdover_world_weights"
    (package / "model" / "student").mkdir(parents=True)
    (package / "__init__.py").touch()
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.delitem(sys.modules, "holdover_world_weights", raising=False)
        assert shipped_model(4) == package / "model" / "student"
        assert shipped_clips() == package / "clips"
        with pytest.raises(FileNotFoundError, match=r"more than 4 .* pip install 'holdover-world\[teacher\]'"):
            shipped_model(5)
        patch.setitem(sys.modules, "holdover_world_weights", None)
        for shipped in (shipped_model, shipped_clips):
            with pytest.raises(FileNotFoundError, match="pip install holdover-world-weights"):
                shipped()

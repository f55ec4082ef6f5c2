"""`holdover demo`: on a model and clips of one's own, and mistakes in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.holdover_world.cli.commands import refused, run
from tests.holdover_world.driving import CAMERAS, world_model, write_clips


def test_the_demo_runs_on_a_model_and_clips_of_one_s_own(tmp_path: Path) -> None:
    clips, out = write_clips(tmp_path / "clips", 4 * 16), tmp_path / "demo"
    world_model().save(tmp_path / "model")
    own = ["--model", str(tmp_path / "model"), "--clips", str(clips), "--out", str(out), "--scenario", "urban"]
    result = run("demo", *own, "--chunks", "8", "--every", "16")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"page: {out / 'index.html'}"
    assert "3682 → 1392" in result.output  # the paper's times
    assert json.loads((out / "report.json").read_text())["environment"]["model"] == "model"
    assert "no urban clip" in refused("demo", *own, "--chunks", "99")


def test_wrong_options_are_one_line(tmp_path: Path) -> None:
    assert "'town' is not one of" in refused("demo", "--scenario", "town")
    assert "no world model in" in refused("demo", "--model", str(tmp_path / "none"))


def test_a_checkpoint_of_another_version_is_one_line(tmp_path: Path) -> None:
    world_model().save(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["keep.bias"]
    save_file(tensors, file)
    assert "train it again" in refused("demo", "--model", str(tmp_path))


def test_clips_of_other_cameras_are_one_line(tmp_path: Path) -> None:
    world_model().save(tmp_path / "model")
    other = tuple(replace(camera, width=camera.width + 16) for camera in CAMERAS)
    clips = write_clips(tmp_path / "clips", 4 * 16, cameras=other)
    own = "--model", str(tmp_path / "model"), "--clips", str(clips), "--chunks", "8", "--scenario", "urban"
    assert "colour of front_wide is 64x32, the model's 48x32" in refused("demo", *own, "--out", str(tmp_path))

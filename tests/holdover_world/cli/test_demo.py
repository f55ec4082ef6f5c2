"""`holdover demo`: on a model and clips of one's own, and mistakes in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from holdover_world.measure import demo
from tests.holdover_world.cli.commands import refused, run
from tests.holdover_world.driving import CAMERAS, world_model, write_clips


def test_the_demo_runs_on_a_model_and_clips_of_one_s_own(tmp_path: Path) -> None:
    clips, out = write_clips(tmp_path / "clips", 4 * 16), tmp_path / "demo"
    world_model().save(tmp_path / "model")
    own = ["--model", str(tmp_path / "model"), "--clips", str(clips), "--out", str(out), "--scenario", "urban"]
    result = run("demo", *own, "--chunks", "8", "--every", "16")
    assert result.exit_code == 0, result.output
    dtype = json.loads((out / "report.json").read_text())["environment"]["dtype"]
    lines = iter(result.output.splitlines())
    assert any(line.startswith(f"urban, oracle plan, {dtype}: held_window+step_hold ") for line in lines)
    assert any("scenario" in line and "PSNR" in line for line in lines)  # the table comes after it
    assert result.output.splitlines()[-1] == f"page: {out / 'index.html'}"
    assert "3682 → 1392" in result.output  # the paper's times
    assert json.loads((out / "report.json").read_text())["environment"]["model"] == "model"
    assert "no urban clip" in refused("demo", *own, "--chunks", "99")


def test_what_is_driven_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(_model: object, _out: Path, options: demo.DemoOptions, **_: object) -> None:
        raise ValueError(f"{options.cadence}: {', '.join(drive.title for drive in options.drives)}")

    monkeypatch.setattr("holdover_world.cli.demo.load", lambda path: (None, path))
    monkeypatch.setattr(demo, "run_demo", tell)
    three = ("highway", "urban", "uturn")
    titles = {told: ", ".join(f"{kind}, {words}" for kind in three) for told, words in demo.TOLD.items()}
    assert f"window: {titles['oracle']}" in refused("demo")
    assert f"window: {titles['newest']}" in refused("demo", "--newest")
    assert f"window: {titles['newest']}, {titles['steady']}" in refused("demo", "--steady", "--newest")
    assert f"window: {', '.join(titles.values())}" in refused("demo", "--all")
    assert "plain: urban, plain cadence" in refused("demo", "--plain", "--scenario", "urban")


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

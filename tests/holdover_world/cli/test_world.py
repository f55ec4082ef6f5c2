"""`holdover world`: its options arrive, a model is trained on one's own clips, and mistakes are one line."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import holdover_world.simulator.record
import holdover_world.training.train
from holdover_world.codec.latents import Codec
from holdover_world.config import CONFIGS
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.scenarios import load_scenario
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import Camera
from holdover_world.training.recipe import Recipe
from holdover_world.training.segments import codec_digest
from holdover_world.training.trainer import read_log
from tests.holdover_world.cli.commands import refused, run
from tests.holdover_world.driving import CAMERAS, write_clips
from tests.holdover_world.small import small_codec


def test_wrong_values_are_one_line(tmp_path: Path) -> None:
    assert "town" in refused("world", "record", "--scenario", "town", "--out", str(tmp_path))
    assert "not a folder of clips" in refused("world", "train", "--data", str(tmp_path), "--out", str(tmp_path / "x"))
    data, out = "--data", "--out"
    assert "'sound' is not one of colour, depth" in refused(
        *("world", "train-autoencoder", data, str(tmp_path), out, str(tmp_path), "--modality", "sound")
    )
    train = "world", "train", data, str(write_clips(tmp_path / "clips", 4)), out, str(tmp_path / "out")
    assert "'huge' is not one of tiny, small" in refused(*train, "--size", "huge")
    assert "camera 'roof' is not one of front_wide, rear" in refused(*train, "--camera", "roof")
    small_codec(CONFIGS["tiny"]).save(tmp_path)
    assert "steps=0" in refused(*train, "--steps", "0", "--autoencoders", str(tmp_path))


def test_record_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(holdover_world.simulator.record, "record", lambda *args, **kwargs: calls.append((args, kwargs)))
    options = ["--clips", "3", "--seed", "7", "--frames", "24", "--no-depth", "--workers", "2"]
    assert run("world", "record", "--scenario", "uturn", "--out", str(tmp_path), *options).exit_code == 0
    assert calls == [(("uturn", 3, tmp_path), {"seed": 7, "frames": 24, "depth": False, "workers": 2})]


def test_train_passes_the_recipe_on_and_draws_the_curve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Path, Recipe, dict[str, Any]]] = []

    def train(data: Path, out: Path, recipe: Recipe, **rest: Any) -> Path:
        calls.append((data, recipe, rest))
        out.mkdir()
        (out / "log.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(3)))
        return out

    monkeypatch.setattr(holdover_world.training.train, "train", train)
    clips = write_clips(tmp_path / "clips", 4)
    small_codec(CONFIGS["tiny"]).save(tmp_path)
    options = ["--data", str(clips), "--out", str(tmp_path / "out"), "--autoencoders", str(tmp_path), "--size", "tiny"]
    options += ["--camera", "rear", "--heldout", "h", "--steps", "3", "--seed", "5", "--start-from", "s"]
    result = run("world", "train", *options)
    assert result.exit_code == 0, result.output
    ((data, recipe, rest),) = calls
    assert data == clips
    assert asdict(recipe) == asdict(Recipe(steps=3, seed=5))
    sizes = rest.pop("codec").sizes
    assert sizes == replace(CONFIGS["tiny"], cameras=CAMERAS[1:])
    assert rest == {"heldout": Path("h"), "start_from": Path("s"), "teacher": None, "device": "cpu"}
    assert (tmp_path / "out" / "curve.png").is_file()


def test_training_continues_in_the_latents_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of the teacher or of the start, unless other autoencoders are given."""
    digests: list[str] = []

    def train(*_: Any, codec: Codec, **__: Any) -> Path:
        digests.append(codec_digest(codec))
        raise ValueError("enough")

    monkeypatch.setattr(holdover_world.training.train, "train", train)
    given = "world", "train", "--data", str(write_clips(tmp_path / "clips", 4)), "--out", "x", "--size", "tiny"
    sizes = replace(CONFIGS["tiny"], cameras=CAMERAS)
    own = {}
    for seed, name in enumerate(("one", "other")):
        small_codec(sizes, seed).save(tmp_path / name)
        own[name] = codec_digest(Codec.load(tmp_path / name, sizes))
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    for options in (("--teacher", one), ("--start-from", one), ("--teacher", other, "--autoencoders", one)):
        assert "enough" in refused(*given, *options)
    assert digests == [own["one"]] * 3
    assert own["one"] != own["other"]


def test_clips_of_one_camera_without_depth_train_a_world_model(tmp_path: Path) -> None:
    """As with recordings of a dashboard camera."""
    camera = Camera(name="front_wide", group="front", width=32, height=16, fov=90, yaw=0, pitch=0, position=(2, 0, 1.3))
    clips = str(write_clips(tmp_path / "clips", 4 * 20, depth=False, cameras=(camera,)))
    networks, out = str(tmp_path / "autoencoders"), str(tmp_path / "world")
    given = "--data", clips, "--heldout", clips, "--batch", "1", "--steps"
    result = run("world", "train-autoencoder", *given, "1", "--out", networks)
    assert result.exit_code == 0, result.output
    own = "--camera", "front_wide", "--no-depth", "--size", "tiny"
    result = run("world", "train", *given, "2", "--out", out, "--autoencoders", networks, *own)
    assert result.exit_code == 0, result.output
    model = WorldModel.load(tmp_path / "world")
    assert model.sizes == replace(CONFIGS["tiny"], cameras=(camera,), depth_channels=0)
    assert list(model.codec.autoencoders) == ["colour"]
    log = list(read_log(tmp_path / "world"))
    assert [line["step"] for line in log] == [0, 1]
    assert len(log[-1]["heldout"]) == 2
    colour = tmp_path / "autoencoders" / "colour"
    assert "heldout_psnr_db" in list(read_log(colour))[-1]
    assert (colour / "curve.png").is_file()
    scenario = load_scenario("urban", model, clips=tmp_path / "clips", chunks=1)
    piece = ClosedLoop(model, scenario.start, scenario.start_actions).step(scenario.actions[0])
    assert model.codec.decode(piece.latents, piece.before)["front_wide"].shape == (1, 4, 16, 32, 3)

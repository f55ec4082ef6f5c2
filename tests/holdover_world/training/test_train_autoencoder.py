"""Training of the autoencoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdover_world.codec.autoencoder import Autoencoder
from holdover_world.codec.checkpoints import read_network
from holdover_world.codec.latents import Codec
from holdover_world.scene.cameras import Camera
from holdover_world.scene.clips import list_clips, open_dataset, read_clip
from holdover_world.scene.depth import from_metres
from holdover_world.training import train_autoencoder as training
from holdover_world.training.train_autoencoder import AutoencoderSchedule, as_video, normalise, train_autoencoder
from holdover_world.training.trainer import read_log
from tests.holdover_world.small import CAMERAS, small_autoencoder, small_config, write_clip

SIZES = {"latent_channels": 4, "widths": (8, 16), "encoder_blocks": 1, "decoder_blocks": 1}


@pytest.mark.parametrize("depth", [False, True])
def test_training_begins_with_principal_components_and_normalises(tmp_path: Path, depth: bool) -> None:
    """Of clips that are principal components and little else; steps of no size add nothing."""
    write_clip(tmp_path / "clips", 0, 40)
    still = AutoencoderSchedule(steps=2, batch=1, warmup=1, muon_rate=0, adam_rate=0)
    out = tmp_path / "run"
    folder = train_autoencoder(tmp_path / "clips", out, still, heldout=None, depth=depth, config=SIZES)
    model = read_network(Autoencoder, folder, torch.float32)
    recording = read_clip(list_clips(tmp_path / "clips")[0], depth=True)
    latents, fraction = [], []
    for camera in CAMERAS:
        assert recording.depth is not None
        video = as_video(recording.frames[camera.name][None])
        if depth:
            video = from_metres(torch.from_numpy(recording.depth[camera.name]))[None, :, None]
        z = model.encode(video)
        latents.append(z.transpose(0, 2).flatten(1))
        fraction.append(float((model.decode(z) - video).var() / video.var()))
    z = torch.cat(latents, 1)
    torch.testing.assert_close(z.mean(1), torch.zeros(4), atol=0.05, rtol=0)
    # One on average, and in proportion to the deviations of the components.
    torch.testing.assert_close(z.var(1), model.deviation_Z / model.deviation_Z.mean(), rtol=0.1, atol=0)
    assert max(fraction) < 0.5


def test_training_learns_what_is_missing(tmp_path: Path) -> None:
    write_clip(tmp_path, 0, 64)
    schedule = AutoencoderSchedule(steps=24, batch=1, warmup=2, ema=0.5)
    folder = train_autoencoder(tmp_path, tmp_path / "run", schedule, heldout=tmp_path, config=SIZES, save_every=4)
    curve = [line["heldout_psnr_db"] for line in read_log(folder) if "heldout_psnr_db" in line]
    assert len(curve) == 6
    assert curve[-1] > curve[0] + 0.5
    with pytest.raises(ValueError, match="another folder"):
        train_autoencoder(tmp_path, tmp_path / "run", AutoencoderSchedule(steps=9), config=SIZES)
    with pytest.raises(ValueError, match="was trained with latent_channels=4, not 8:"):
        train_autoencoder(tmp_path, tmp_path / "run", schedule, config={**SIZES, "latent_channels": 8})


def test_an_interrupted_one_is_no_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved on the way has not been normalised."""
    write_clip(tmp_path / "clips", 0, 8)
    schedule, sizes = AutoencoderSchedule(steps=1, batch=1), small_config(depth_channels=0)

    def power_cut(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "normalise", power_cut)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(tmp_path / "clips", tmp_path / "colour", schedule, config=SIZES)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"training of .*colour was interrupted; run it again"):
        Codec.load(tmp_path, sizes)
    train_autoencoder(tmp_path / "clips", tmp_path / "colour", schedule, config=SIZES)
    assert Codec.load(tmp_path, sizes).autoencoders["colour"].mean_Z.isfinite().all()


def test_a_rest_of_less_than_a_latent_frame_is_not_normalised_by() -> None:
    rest = np.random.default_rng(0).integers(0, 256, (46, 16, 24, 3), np.uint8)
    models = small_autoencoder(3, 4), small_autoencoder(3, 4)
    models[1].load_state_dict(models[0].state_dict())
    for model, video in zip(models, (rest, rest[:44]), strict=True):
        normalise(model, [{"front_wide": video}])
    assert torch.equal(models[0].mean_Z, models[1].mean_Z)
    assert torch.equal(models[0].std_Z, models[1].std_Z)


def pretend_clip(folder: Path, frames: int, camera: Camera = CAMERAS[0]) -> Path:
    open_dataset(folder, [camera])
    (folder / "urban-000000").mkdir()
    (folder / "urban-000000" / "clip.json").write_text(f'{{"frames": {frames}}}')
    return folder


def test_clips_that_cannot_be_trained_on_are_named_at_once(tmp_path: Path) -> None:
    ragged = replace(CAMERAS[0], width=44)
    good, bad = pretend_clip(tmp_path / "good", 64), pretend_clip(tmp_path / "bad", 64, ragged)
    for clips, named in (
        ({"data": pretend_clip(tmp_path / "7", 7)}, "7/urban-000000 has 7 frames, 8 are needed"),
        ({"heldout": pretend_clip(tmp_path / "63", 63)}, "63/urban-000000 has 63 frames, 64 are needed"),
        ({"data": bad}, "front_wide of .*bad is 44x32; record it in multiples of 8 pixels"),
        ({"heldout": bad}, "front_wide of .*bad is 44x32; record it in multiples of 8 pixels"),
    ):
        with pytest.raises(ValueError, match=named):
            train_autoencoder(**{"data": good, "out": tmp_path / "run", "schedule": AutoencoderSchedule(), **clips})


def test_a_folder_without_clips_is_named(tmp_path: Path) -> None:
    write_clip(tmp_path, 0, 4).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="holds no clips; record some with"):
        train_autoencoder(tmp_path, tmp_path / "run", AutoencoderSchedule(steps=1))

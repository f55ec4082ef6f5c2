"""The autoencoder against numpy's principal components and closed forms; its training; depth as a network sees it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdover_world.codec.autoencoder import Autoencoder, Down, Up
from holdover_world.codec.checkpoints import read_network, write_network
from holdover_world.codec.latents import Codec
from holdover_world.scene.cameras import Camera
from holdover_world.scene.clips import list_clips, open_dataset, read_clip
from holdover_world.scene.depth import FAR, NEAR, from_metres, to_metres
from holdover_world.training import train_autoencoder as training
from holdover_world.training.train_autoencoder import AutoencoderSchedule, as_video, normalise, train_autoencoder
from holdover_world.training.trainer import read_log
from tests.holdover_world.small import CAMERAS, small_autoencoder, small_config, write_clip

SIZES = {"latent_channels": 4, "widths": (8, 16), "encoder_blocks": 1, "decoder_blocks": 1}


def random_video(frames: int, colours: int = 3, *, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.rand((batch, frames, colours, 16, 24), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_stream_is_encoded_as_the_whole() -> None:
    model, video = small_autoencoder(3, 4), random_video(12)
    whole = model.encode(video)
    assert whole.shape == (2, 3, 4, 2, 3)
    assert torch.equal(torch.cat([model.encode(part) for part in video.split(4, 1)], 1), whole)
    torch.testing.assert_close(model.encode(video, at_once=3), whole, atol=1e-5, rtol=1e-5)


def test_a_stream_is_decoded_as_the_whole() -> None:
    model = small_autoencoder(3, 4)
    z = torch.randn(2, 4, 4, 2, 3)
    whole = model.decode(z)
    assert whole.shape == (2, 16, 3, 16, 24)
    parts = [model.decode(z[:, :1]), model.decode(z[:, 1:3], z[:, 0]), model.decode(z[:, 3:], z[:, 2])]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_decoding_sees_the_frame_before_and_nothing_else() -> None:
    model = small_autoencoder(3, 4)
    z = torch.randn(1, 4, 4, 2, 3)
    changed = z.clone()
    changed[:, 1] += 1
    differs = (model.decode(z) != model.decode(changed)).unflatten(1, (4, 4)).flatten(2).any(2)
    assert differs.tolist() == [[False, True, True, False]]


def test_a_deeper_decoder_begins_as_the_one_it_was() -> None:
    model = small_autoencoder(3, 4)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.1)
    blocks = model.config.decoder_blocks
    deeper, z = model.deepened(blocks + 2), torch.randn(2, 3, 4, 2, 3)
    assert len(deeper.decoder) == len(model.decoder) + 4
    assert torch.equal(deeper.decode(z), model.decode(z))
    assert torch.equal(deeper.encode(random_video(8)), model.encode(random_video(8)))
    with pytest.raises(ValueError, match=f"decoder_blocks={blocks}: this autoencoder has {blocks}; give more"):
        model.deepened(blocks)


def test_latents_are_the_posteriors_mean_normalised() -> None:
    model, video = small_autoencoder(3, 4), random_video(8)
    mean, log_variance = model.posterior(video)
    at = (slice(None), None, None)
    torch.testing.assert_close(model.encode(video), (mean - model.mean_Z[at]) / model.std_Z[at], atol=1e-5, rtol=1e-5)
    # Decoding turns that round again: both go through the same decoder.
    made = model.decode(model.encode(video))
    torch.testing.assert_close(made, model.reconstruct(mean), atol=1e-5, rtol=1e-5)
    # In training the latents are a draw.
    noise = torch.randn_like(mean)
    drawn, *moments = model(video, noise)
    torch.testing.assert_close(drawn, model.reconstruct(mean + (log_variance / 2).exp() * noise))
    assert all(map(torch.equal, moments, (mean, log_variance)))


def numpy_blocks(video: Tensor) -> np.ndarray:
    """Each block of 4 frames and 8 by 8 pixels as a row; in which order within it does not matter to its components."""
    b, t, c, h, w = video.shape
    cut = video.numpy().reshape(b, t // 4, 4, c, h // 8, 8, w // 8, 8)
    return cut.transpose(0, 1, 4, 6, 2, 3, 5, 7).reshape(-1, 4 * c * 64).astype(np.float64)


def test_a_fresh_one_reconstructs_as_numpys_principal_components_do() -> None:
    """Its convolutions add nothing yet."""
    video, other = random_video(16, 1, batch=12).cumsum(-1) / 9, random_video(4, 1, seed=1).cumsum(-1) / 9
    model = Autoencoder(colours=1, **SIZES)
    model.take_principal_components(Autoencoder.blocks(video))
    blocks = numpy_blocks(video)
    centre = blocks.mean(0)
    _, singular, components = np.linalg.svd(blocks - centre, full_matrices=False)
    scores = (numpy_blocks(other) - centre) @ components[:4].T
    made, mean, log_variance = model(other, torch.zeros(2, 1, 4, 2, 3))
    np.testing.assert_allclose(numpy_blocks(made.detach()), scores @ components[:4] + centre, atol=2e-4)
    found = mean.detach().permute(0, 1, 3, 4, 2).reshape(-1, 4).double().numpy()
    deviations = singular[:4] / np.sqrt(len(blocks))
    np.testing.assert_allclose(np.abs(found), np.abs(scores / deviations), atol=2e-3)  # directions may point either way
    assert (log_variance == -6).all()


def test_where_resolution_changes_a_path_averages_and_repeats() -> None:
    up, down = Up(8, 4), Down(4, 8)
    for layer in (up.conv, down.conv):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.randn(1, 8, 3, 2)
    # By hand: of the 4 * 4 values of a finer pixel's square the first two are the first channel's, and so on.
    expected = torch.stack([x[0, 2 * c + i // 2, :, :] for c in range(4) for i in (0, 1, 2, 3)]).view(4, 2, 2, 3, 2)
    assert torch.equal(up(x)[0], expected.permute(0, 3, 1, 4, 2).reshape(4, 6, 4))
    torch.testing.assert_close(down(up(x)), x)


def test_it_is_saved_and_read(tmp_path: Path) -> None:
    model, video = small_autoencoder(3, 4), random_video(8)
    write_network(model, tmp_path / "colour")
    assert {file.name for file in (tmp_path / "colour").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "colour").iterdir()} == {0o644}
    read = read_network(Autoencoder, tmp_path / "colour", torch.float32)
    assert not read.training
    for name, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value.bfloat16().float())
    half = read_network(Autoencoder, tmp_path / "colour", torch.bfloat16)
    torch.testing.assert_close(half.encode(video), read.encode(video), atol=0.1, rtol=0.1)
    write_network(read, tmp_path / "copy")  # which does not tell where it came from
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "colour" / name).read_bytes()
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other does not hold a Autoencoder of this version"):
        read_network(Autoencoder, tmp_path / "other", torch.float32)


@pytest.mark.parametrize(("frames", "height"), [(6, 16), (4, 12)])
def test_what_it_cannot_cut_up_is_refused(frames: int, height: int) -> None:
    with pytest.raises(ValueError, match=f"{frames} frames of 24x{height}: give a multiple of 4 frames, and of 8"):
        small_autoencoder(3, 4).posterior(torch.zeros(1, frames, 3, height, 24))


def test_depth_is_relative() -> None:
    middle = float(np.sqrt(NEAR * FAR))
    metres = torch.tensor([0.1, NEAR, middle, FAR, 1e6])
    np.testing.assert_allclose(from_metres(metres), [-1, -1, 0, 1, 1], atol=1e-6)
    # The same factor is the same step, wherever.
    steps = from_metres(torch.tensor([1.0, 2.0, 100.0, 200.0])).diff()
    assert steps[0].item() == pytest.approx(steps[2].item(), abs=1e-6)
    metres = torch.from_numpy(np.geomspace(NEAR, FAR, 50))
    np.testing.assert_allclose(to_metres(from_metres(metres)), metres, rtol=1e-4)
    np.testing.assert_allclose(to_metres(torch.tensor([-3.0, 3.0])), [NEAR, FAR], rtol=1e-5)


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

"""The autoencoder against the principal components of numpy and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdover_world.codec.autoencoder import Autoencoder, Down, Up
from holdover_world.codec.checkpoints import read_network, write_network
from tests.holdover_world.small import small_autoencoder

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
    # Decoding undoes the normalisation, so both calls reach the decoder with the same latents.
    made = model.decode(model.encode(video))
    torch.testing.assert_close(made, model.reconstruct(mean), atol=1e-5, rtol=1e-5)
    # In training the latents are sampled.
    noise = torch.randn_like(mean)
    drawn, *moments = model(video, noise)
    torch.testing.assert_close(drawn, model.reconstruct(mean + (log_variance / 2).exp() * noise))
    assert all(map(torch.equal, moments, (mean, log_variance)))


def numpy_blocks(video: Tensor) -> np.ndarray:
    """Each block of 4 frames and 8 by 8 pixels as a row. The order within a row does not matter."""
    b, t, c, h, w = video.shape
    cut = video.numpy().reshape(b, t // 4, 4, c, h // 8, 8, w // 8, 8)
    return cut.transpose(0, 1, 4, 6, 2, 3, 5, 7).reshape(-1, 4 * c * 64).astype(np.float64)


def test_a_fresh_one_reconstructs_as_numpys_principal_components_do() -> None:
    """Fresh convolutions add nothing."""
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
    np.testing.assert_allclose(np.abs(found), np.abs(scores / deviations), atol=2e-3)  # signs are arbitrary
    assert (log_variance == -6).all()


def test_where_resolution_changes_a_path_averages_and_repeats() -> None:
    up, down = Up(8, 4), Down(4, 8)
    for layer in (up.conv, down.conv):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.randn(1, 8, 3, 2)
    # By hand: output channel c has two input channels, and each of them fills one row of every 2 by 2 pixels.
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
    write_network(read, tmp_path / "copy")  # the files do not tell where the network was read from
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "colour" / name).read_bytes()
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other does not hold a Autoencoder of this version"):
        read_network(Autoencoder, tmp_path / "other", torch.float32)


@pytest.mark.parametrize(("frames", "height"), [(6, 16), (4, 12)])
def test_what_it_cannot_cut_up_is_refused(frames: int, height: int) -> None:
    with pytest.raises(ValueError, match=f"{frames} frames of 24x{height}: give a multiple of 4 frames, and of 8"):
        small_autoencoder(3, 4).posterior(torch.zeros(1, frames, 3, height, 24))

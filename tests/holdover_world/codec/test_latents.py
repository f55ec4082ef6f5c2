"""The codec: pictures of a rig as tokens, worked out by hand with autoencoders that lose nothing."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from holdover_world.codec.autoencoder import Autoencoder
from holdover_world.codec.latents import Codec
from holdover_world.config import WorldConfig
from holdover_world.scene.depth import from_metres
from tests.holdover_world.small import CAMERAS, latents, small_codec, small_config, small_model

Colour = dict[str, NDArray[np.uint8]]
Depth = dict[str, NDArray[np.float32]]


def lossless() -> Codec:
    """A latent channel for each value of a block of pixels, in the order frame, colour, row, column. The rest are 0."""
    sizes = small_config(latent_channels=1024, depth_channels=256)
    autoencoders = {}
    for modality, colours, channels in (("colour", 3, 1024), ("depth", 1, 256)):
        model = Autoencoder(colours=colours, latent_channels=channels, widths=(8, 16))
        model.basis_QZ.copy_(torch.eye(*model.basis_QZ.shape))
        autoencoders[modality] = model.eval().requires_grad_(False)
    return Codec(sizes, autoencoders)


def pictures(config: WorldConfig, frames: int) -> tuple[Colour, Depth]:
    rng = np.random.default_rng(0)
    sizes = {c.name: (frames, c.height, c.width) for c in config.cameras}
    colour = {name: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for name, size in sizes.items()}
    return colour, {name: rng.uniform(1, 600, size).astype(np.float32) for name, size in sizes.items()}


def test_pictures_go_there_and_back() -> None:
    codec = lossless()
    colour, depth = pictures(codec.sizes, 8)
    x = codec.encode(colour, depth)
    assert x.shape == (1, 2, 13 + 5, 4096)
    back, far = codec.decode(x), codec.decode_depth(x)
    assert list(back) == list(far) == [c.name for c in CAMERAS]
    for name in back:
        assert np.array_equal(back[name][0], colour[name])
        assert far[name].shape == (1, *depth[name].shape)  # the padding is cropped
        np.testing.assert_allclose(far[name][0], depth[name], rtol=1e-4)


def test_tokens_are_ordered_by_modality_group_view_row_and_column() -> None:
    codec = lossless()
    colour, depth = ({name: np.zeros_like(x) for name, x in each.items()} for each in pictures(codec.sizes, 8))
    dark = codec.encode(colour, depth)
    colour["front_narrow"][5, 16 + 9, 16 + 3, 1] = 255  # picture 1 of latent frame 1; token row 1, column 1
    depth["front_narrow"][2, 8, 32 + 1] = 90
    depth["rear"][4, 0, 0] = 90
    lit = (codec.encode(colour, depth) != dark)[0].nonzero().tolist()
    narrow, depths = 2 * 3, 2 * (2 * 3) + 1
    within = (1 * 3 + 1) * 64 + 1 * 8 + 3  # picture, colour, row and column of the block
    assert [1, narrow + 1 * 3 + 1, within * 4 + 2] in lit  # in the third of the four latents of a token
    assert [1, depths + 4, 0] in lit
    assert [0, depths + 2 + 1, (2 * 64 + 1) * 16 + 4] in lit  # in the fifth of the sixteen latents of a token
    assert len(lit) == 3


def test_a_token_of_depth_beyond_the_edge_repeats_it() -> None:
    codec = lossless()
    colour, depth = pictures(codec.sizes, 4)
    token = codec.encode(colour, depth)[0, 0, -1].view(4, 8, 8, 4, 4)  # of the rear camera, which has 16 by 16 pixels
    image = token.permute(0, 3, 1, 4, 2).reshape(4, 32, 32).numpy()
    expected = np.pad(from_metres(torch.from_numpy(depth["rear"])).numpy(), ((0, 0), (0, 16), (0, 16)), mode="edge")
    np.testing.assert_allclose(image, expected, atol=1e-6)


def test_a_stream_is_decoded_as_the_whole() -> None:
    model = small_model()
    x = latents(model, 4, batch=2)
    for decode in (model.codec.decode, model.codec.decode_depth):
        whole, first, then = decode(x), decode(x[:, :2]), decode(x[:, 2:], x[:, 1])
        for name, video in whole.items():
            assert np.array_equal(np.concatenate([first[name], then[name]], 1), video)


def test_cameras_decoded_together_are_each_decoded_alone() -> None:
    model = small_model()
    codec, x = model.codec, latents(model, 2, batch=2)
    together = codec.pictures("colour", x)
    for plane in model.sizes.planes[:3]:
        # By hand: the token of row r and column c has the latents 2r, 2r + 1 and 2c, 2c + 1.
        z = torch.zeros(2, 2, 4, 2 * plane.rows, 2 * plane.columns)
        for token in range(plane.rows * plane.columns):
            r, c = divmod(token, plane.columns)
            z[..., 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = x[:, :, plane.start + token].view(2, 2, 4, 2, 2)
        alone = codec.autoencoders["colour"].decode(z)
        torch.testing.assert_close(together[plane.camera.name], alone, atol=1e-5, rtol=1e-5)


def test_what_is_missing_or_ragged_is_named() -> None:
    codec = small_codec(small_config())
    colour, depth = pictures(codec.sizes, 4)
    with pytest.raises(ValueError, match=r"'rear' has no colour; give it beside \['front_narrow', 'front_wide'\]"):
        codec.encode({name: v for name, v in colour.items() if name != "rear"}, depth)
    with pytest.raises(ValueError, match="camera 'rear' has no depth"):
        codec.encode(colour, {name: v for name, v in depth.items() if name != "rear"})
    with pytest.raises(ValueError, match="give the depth of the frames as well"):
        codec.encode(colour)
    with pytest.raises(ValueError, match="3 frames of front_wide are not a multiple of 4"):
        codec.encode({name: v[:3] for name, v in colour.items()}, depth)


def test_a_model_of_colour_alone_wants_no_depth_and_draws_none() -> None:
    codec = small_codec(small_config(depth_channels=0))
    colour, depth = pictures(codec.sizes, 4)
    x = codec.encode(colour)
    assert x.shape == (1, 1, 13, 16)
    assert torch.equal(x, codec.encode(colour, depth))
    with pytest.raises(ValueError, match="has no depth, only colour"):
        codec.decode_depth(x)


def test_a_codec_is_kept_in_a_folder_and_shared_by_copies(tmp_path: Path) -> None:
    codec = small_codec(small_config())
    codec.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"colour", "depth"}
    read = Codec.load(tmp_path, codec.sizes, dtype=torch.float32)
    for modality, autoencoder in codec.autoencoders.items():
        for name, value in autoencoder.state_dict().items():
            assert torch.equal(read.autoencoders[modality].state_dict()[name], value.bfloat16().float())
    assert deepcopy(codec) is codec
    shutil.rmtree(tmp_path / "depth")
    with pytest.raises(ValueError, match=r"no autoencoder of depth in .*: give another folder"):
        Codec.load(tmp_path, codec.sizes)


def test_autoencoders_that_do_not_fit_the_sizes_are_refused() -> None:
    autoencoders = small_codec(small_config()).autoencoders
    with pytest.raises(ValueError, match="no autoencoder of depth was given: give one, or sizes without depth"):
        Codec(small_config(), {"colour": autoencoders["colour"]})
    with pytest.raises(ValueError, match="of colour has 4 latent channels, the model takes 8: give another"):
        Codec(small_config(latent_channels=8, depth_channels=2), autoencoders)

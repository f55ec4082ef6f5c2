from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from holdover_world.codec.checkpoints import weights_digest, write_difference, write_network
from holdover_world.codec.latents import Codec
from holdover_world.conditioning.motion import drive
from holdover_world.config import CONFIGS, WorldConfig, config_for, token_rays
from holdover_world.loop.scenarios import shipped_model
from holdover_world.model.rotary import RotaryTables, rotary_table, rotate
from holdover_world.model.transformer import Block, WorldModel, attention
from holdover_world.scene.cameras import RIG, camera_rays, stitch
from holdover_world.scene.clips import open_dataset
from holdover_world.scene.layout import Track
from tests.holdover_world.model.naive_transformer import naive_action_features, naive_block_causal
from tests.holdover_world.small import CAMERAS, latents, small_config, small_layout, small_model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "heads=5"),
        ({"context": 3}, "context=3"),
        ({"heads": 8}, "rotary"),
        ({"patch": 3, "depth_channels": 0}, "front_wide is 48x32; give multiples of 24 pixels"),
        ({"depth_channels": 2}, r"2 \* 4\*\*2 values, a token of colour 16"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_config(**changes)


def test_cameras_of_a_group_have_one_size() -> None:
    wider = replace(CAMERAS[1], width=64)
    with pytest.raises(ValueError, match=r"group 'front' differ in size \(front_wide 48x32, front_narrow 64x32\)"):
        small_config(cameras=(CAMERAS[0], wider))
    with pytest.raises(ValueError, match="cameras is empty"):
        small_config(cameras=())


def test_the_autoencoders_go_where_the_model_goes() -> None:
    model = small_model()
    model.to("meta")
    assert {autoencoder.device.type for autoencoder in model.codec.autoencoders.values()} == {"meta"}
    other = WorldModel.of(small_config()).to("meta")
    other.codec = small_model().codec
    assert {autoencoder.device.type for autoencoder in other.codec.autoencoders.values()} == {"meta"}


def test_rotary_scores_depend_on_distance_alone() -> None:
    table = rotary_table(torch.arange(10.0)[:, None], [torch.tensor([1.0, 0.3, 0.05])])
    q, k = torch.randn(6).expand(10, 6), torch.randn(6).expand(10, 6)
    scores = rotate(q, table) @ rotate(k, table).T
    for distance in range(-3, 4):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_plain_attention_equals_the_fused_one() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 16)
    expected = F.scaled_dot_product_attention(q, k, v, scale=1)
    torch.testing.assert_close(
        attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).float(), expected, atol=0.05, rtol=0.05
    )
    torch.testing.assert_close(attention(q, k, v), expected)


def test_neighbouring_cameras_look_where_the_rig_says() -> None:
    rays = token_rays(WorldConfig())
    for plane in WorldConfig().planes:
        x, y = rays[plane.tokens, :2].T
        middle = math.atan2(y.mean(), x.mean())
        # At the right edge a token of depth may reach beyond its camera.
        tolerance = 0.02 if plane.modality == "colour" else 0.25
        assert abs(math.remainder(middle - math.radians(plane.camera.yaw), math.tau)) < tolerance
        assert (rays[plane.tokens, 3:] == np.float32(plane.camera.position)).all()
    front = rays[WorldConfig().planes[0].tokens].reshape(4, 8, 6)
    assert (front[:, 0, 1] > front[:, -1, 1]).all()  # left is positive
    assert (front[0, :, 2] > front[-1, :, 2]).all()  # the first row is the sky
    np.testing.assert_allclose(np.linalg.norm(rays[:, :3], axis=1), 1, atol=1e-6)


def test_a_ray_goes_through_the_centre_of_its_square() -> None:
    """The centre of 32 by 32 pixels lies amid the four in the middle; where there are none, on the camera's corner."""
    wide, _, rear = small_config().cameras
    pixels = camera_rays(wide)
    np.testing.assert_allclose(camera_rays(wide, every=32)[0, 0], pixels[15:17, 15:17].mean((0, 1)))
    pixels = camera_rays(rear)
    corner = pixels[-1, -1] + (pixels[-1, -1] - pixels[-2, -2]) / 2
    np.testing.assert_allclose(camera_rays(rear, every=32), corner[None, None])


def test_the_shipped_rigs_tokens() -> None:
    """By hand: of colour 16 pixels wide, of depth 32."""
    sizes = WorldConfig()
    assert [(group.name, group.views, group.height, group.width) for group in sizes.view_groups] == [
        ("front", 2, 4, 8),
        ("side", 4, 3, 4),
        ("rear", 1, 3, 7),
        ("front.depth", 2, 2, 4),
        ("side.depth", 4, 2, 2),
        ("rear.depth", 1, 2, 4),
    ]
    assert sizes.tokens == 2 * 32 + 4 * 12 + 21 + 2 * 8 + 4 * 4 + 8 == 173
    assert sizes.patch_values == 48 * 4 == 12 * 16
    assert [plane.camera for plane in sizes.planes] == [*RIG, *RIG]
    assert [plane.start for plane in sizes.planes][:4] == [0, 32, 64, 76]
    assert WorldConfig.from_dict(json.loads(json.dumps(sizes.to_dict()))) == sizes
    assert replace(sizes, depth_channels=0).tokens == 133


def test_a_size_takes_the_cameras_of_a_folder(tmp_path: Path) -> None:
    open_dataset(tmp_path, CAMERAS)
    assert config_for("tiny", tmp_path) == replace(CONFIGS["tiny"], cameras=CAMERAS)
    chosen = config_for("small", tmp_path, cameras=["rear", "front_wide"], depth=False)
    assert chosen == WorldConfig(cameras=(CAMERAS[0], CAMERAS[2]), depth_channels=0)
    with pytest.raises(ValueError, match="camera 'left' is not one of front_wide, front_narrow, rear"):
        config_for("small", tmp_path, cameras=["left"])


def test_depth_stands_amid_the_colour_that_it_covers() -> None:
    """The phases of a token of depth are the mean of those of its four tokens of colour: 3 rows stay below pi."""
    camera = replace(CAMERAS[0], width=64, height=64)
    sizes = small_config(cameras=(camera,), channels=64)
    [(cos, sin)] = RotaryTables(sizes).temporal([0], 1, torch.device("cpu"), torch.float32)
    phases = torch.complex(cos, sin)[:, cos.shape[1] // 2 :].angle()
    colour, depth = phases[:16].view(2, 2, 2, 2, -1), phases[16:].view(2, 2, -1)
    assert len(phases) == 16 + 4
    torch.testing.assert_close(depth, colour.mean((1, 3)))
    assert not torch.equal(depth[0, 0], depth[1, 1])


@pytest.mark.parametrize("in_layout", [False, True])
def test_streaming_with_the_kv_cache_equals_one_masked_pass(in_layout: bool) -> None:
    model = small_model()
    track = None
    if in_layout:
        poses = torch.stack([torch.arange(32.0) / 4, torch.zeros(32), torch.arange(32.0) / 90], -1).double()
        track = Track(small_layout(), poses, torch.tensor([[3.0, 0.05]]).repeat(32, 1))
    x, actions = latents(model, 8), torch.rand(1, 8, 2) * 4 - 2
    sigma_F = torch.tensor([0.0] * 6 + [0.8] * 2)
    expected = naive_block_causal(model, x, sigma_F, actions, track)
    history = model.new_history()
    for start in (0, 2, 4):
        window = slice(start, start + 2)
        written = model(x[:, window], sigma=0.0, action_BFA=actions[:, window], history=history, write=True)
        torch.testing.assert_close(written, expected[:, window], atol=1e-4, rtol=1e-4)
        if track is not None:
            history.stand([track], [4 * (start + 2) - 1])
    noisy = model(x[:, 6:], sigma=0.8, action_BFA=actions[:, 6:], history=history)
    torch.testing.assert_close(noisy, expected[:, 6:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(noisy, model(x[:, 6:], sigma=0.8, action_BFA=actions[:, 6:]), atol=1e-2)


def test_what_is_expected_is_carried_over() -> None:
    """A model that adds nothing shows what is expected where it keeps it, or draws nothing; without an action it
    expects what was there."""
    model = small_model()
    for layer in (*model.head, model.keep):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    shown, actions, history = latents(model, 2), torch.tensor([0.2, 0.5]).expand(1, 2, 2), model.new_history()
    model(shown, sigma=0.0, action_BFA=actions, history=history, write=True)
    moved = model.reprojection(shown[:, 1], drive(drive(None, actions)[1], actions)[0])[0]
    nothing, stays = torch.zeros_like(shown), shown[:, 1:].expand_as(shown)
    for bias, action, expected in ((50.0, actions, moved), (-200.0, actions, nothing), (50.0, None, stays)):
        torch.nn.init.constant_(model.keep.bias, bias)
        drawn = model(latents(model, 2, seed=1), sigma=1.0, action_BFA=action, history=history)
        assert torch.equal(drawn, expected)


def test_no_action_stands_for_any() -> None:
    model = small_model()
    x, action = latents(model, 2, batch=2), torch.tensor([0.3, -0.2]).expand(2, 2, 2)
    model.no_action_C.copy_(model.action_mlp(naive_action_features(action[:1]))[0, 0])
    told = model(x, sigma=0.5, action_BFA=action)
    torch.testing.assert_close(model(x, sigma=0.5, action_BFA=None), told)
    assert not torch.allclose(model(x, sigma=0.5, action_BFA=-action), told, atol=1e-2)


def test_a_row_of_a_batch_is_that_row_alone() -> None:
    model = small_model()
    x, actions = latents(model, 2, batch=2), torch.rand(2, 2, 2)
    both = model(x, sigma=torch.tensor([0.3, 0.9]), action_BFA=actions)
    alone = model(x[1:], sigma=0.9, action_BFA=actions[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth_channels", [0, 1])
def test_a_checkpoint_keeps_weights_sizes_and_codec(tmp_path: Path, depth_channels: int) -> None:
    model = small_model(depth_channels=depth_channels)
    model.save(tmp_path / "model")
    loaded = WorldModel.load(tmp_path / "model", dtype=torch.float32)
    assert loaded.sizes == model.sizes
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float())
    half = WorldModel.load(tmp_path / "model")  # what is not kept, but made anew, is none the worse for it
    assert torch.equal(half.rays_NR.bfloat16(), model.rays_NR.bfloat16())
    shown = loaded.codec.decode(latents(model, 2))
    for name, video in model.codec.decode(latents(model, 2)).items():
        assert np.abs(shown[name].astype(int) - video).max() <= 4  # the weights are rounded
    folders = {"colour", "depth"} if depth_channels else {"colour"}
    files = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == files | folders


def test_a_student_is_kept_as_the_difference_from_its_teacher(tmp_path: Path) -> None:
    teacher = small_model()
    teacher.save(tmp_path)
    kept, student = WorldModel.load(tmp_path, dtype=torch.float32), small_model()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.02)
            parameter[..., ::2] += 0.01
    write_difference(student, kept, tmp_path / "student")
    read = WorldModel.load(tmp_path / "student", dtype=torch.float32)
    for (name, value), before in zip(student.state_dict().items(), kept.state_dict().values(), strict=True):
        most = (value - before).abs().amax(-1, keepdim=True)
        assert ((read.state_dict()[name] - value).abs() <= 0.51 * most / 127 + value.abs() / 256 + 1e-7).all(), name
    assert set(read.codec.autoencoders) == set(teacher.codec.autoencoders)
    assert set(Codec.load(tmp_path / "student", student.sizes).autoencoders) == set(teacher.codec.autoencoders)
    assert weights_digest(tmp_path / "student") != weights_digest(tmp_path)
    small_model(layers=2).save(tmp_path)
    with pytest.raises(ValueError, match="student does not hold the difference of a WorldModel from this one"):
        WorldModel.load(tmp_path / "student")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_kept_whole_is_the_one_kept_as_a_difference(tmp_path: Path, dtype: torch.dtype) -> None:
    """Bit for bit, and without its teacher's weights."""
    teacher, student = small_model(0), small_model(1)
    teacher.save(tmp_path)
    write_difference(student, WorldModel.load(tmp_path, dtype=torch.float32), tmp_path / "difference")
    write_network(WorldModel.load(tmp_path / "difference", dtype=torch.float32), tmp_path / "whole")
    expected = WorldModel.load(tmp_path / "difference", dtype=dtype)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    whole = WorldModel.load(tmp_path / "whole", dtype=dtype)
    for name, value in expected.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value), name
    shown = latents(student, 1)
    for name, video in expected.codec.decode(shown).items():
        assert np.array_equal(whole.codec.decode(shown)[name], video)


def test_a_model_does_not_take_the_autoencoders_of_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    small_model().save(tmp_path / "model")
    for modality in ("colour", "depth"):
        (tmp_path / "model" / modality).rename(tmp_path / modality)
    with pytest.raises(ValueError, match=r"no autoencoder of colour in .*model: give another folder"):
        WorldModel.load(tmp_path / "model")


@pytest.mark.skipif(not (shipped_model().parent / "diffusion_pytorch_model.safetensors").is_file(), reason="no teacher")
def test_few_steps_take_the_shipped_student_and_more_its_teacher() -> None:
    student, teacher = WorldModel.load(shipped_model(4)), WorldModel.load(shipped_model(5))
    assert shipped_model() == shipped_model(4)
    assert student.sizes == teacher.sizes == CONFIGS["small"]
    moved = {n for n, value in teacher.state_dict().items() if not torch.equal(student.state_dict()[n], value)}
    parameters = dict(teacher.named_parameters())
    still = parameters.keys() - moved
    assert moved <= parameters.keys()  # not the autoencoders, which are its teacher's
    # A student is always told the action; what it learned of layouts its teacher was given.
    assert still == {"no_action_C", *(name for name in parameters if "layout" in name)}
    assert set(Codec.load(shipped_model(), student.sizes).autoencoders) == {"colour", "depth"}


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holdover world train"):
        WorldModel.load(tmp_path / "other")
    model = small_model()
    model.save(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"channels": 5}')
    with pytest.raises(ValueError, match="model does not hold a WorldModel of this version; train it again"):
        WorldModel.load(tmp_path / "model")
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ValueError, match=r"has no autoencoder; set model\.codec"):
        _ = WorldModel.of(model.sizes).codec


def test_diffusers_reads_what_diffusers_wrote(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = WorldModel.from_pretrained(tmp_path)
    assert loaded.sizes == model.sizes
    x, action = latents(model, 2), torch.rand(1, 2, 2)
    with torch.no_grad():
        expected = model(x, sigma=0.5, action_BFA=action)
        torch.testing.assert_close(loaded(x, sigma=0.5, action_BFA=action), expected)


def test_the_rig_is_stitched_in_place() -> None:
    frames = {c.name: np.full((2, c.height, c.width, 3), i + 1) for i, c in enumerate(RIG)}
    canvas = stitch(frames)
    assert canvas.shape == (2, 160, 256, 3)
    names = [c.name for c in RIG]
    assert canvas[0, 0, 0, 0] == names.index("front_wide") + 1
    assert canvas[0, 64, 0, 0] == names.index("left_rear") + 1
    assert canvas[0, 159, 128, 0] == names.index("rear") + 1
    assert canvas[0, 159, 0, 0] == 0
    assert (canvas > 0).sum() == 2 * 3 * sum(c.width * c.height for c in RIG)
    below = stitch({"periscope": frames["rear"], **frames})
    np.testing.assert_array_equal(below[:, :160], canvas)
    np.testing.assert_array_equal(below[:, 160:, 72:184], frames["rear"])  # no camera of the rig: a row of its own


def test_the_tap_is_what_attention_sees() -> None:
    model, seen = small_model(), []
    slot = model.holdover_slots()[0]
    assert isinstance(slot.block, Block)
    slot.block.register_forward_pre_hook(lambda block, args: seen.append(slot.taps["modulated"](block, *args)))
    slot.block.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(latents(model, 2), sigma=0.5, action_BFA=torch.rand(1, 2, 2))
    assert torch.equal(seen[0], seen[1].flatten(1, 2))

"""World models on disk: whole, and a student as the difference from its teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from holdover_world.codec.checkpoints import WEIGHTS, weights_digest, write_difference, write_network
from holdover_world.codec.latents import Codec
from holdover_world.config import CONFIGS
from holdover_world.loop.scenarios import shipped_model
from holdover_world.model.transformer import WorldModel
from tests.holdover_world.small import latents, small_model


@pytest.mark.parametrize("depth_channels", [0, 1])
def test_a_checkpoint_keeps_weights_sizes_and_codec(tmp_path: Path, depth_channels: int) -> None:
    model = small_model(depth_channels=depth_channels)
    model.save(tmp_path / "model")
    loaded = WorldModel.load(tmp_path / "model", dtype=torch.float32)
    assert loaded.sizes == model.sizes
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float())
    half = WorldModel.load(tmp_path / "model")  # buffers that are computed again keep their precision
    assert torch.equal(half.rays_NR.bfloat16(), model.rays_NR.bfloat16())
    shown = loaded.codec.decode(latents(model, 2))
    for name, video in model.codec.decode(latents(model, 2)).items():
        assert np.abs(shown[name].astype(int) - video).max() <= 4  # the weights are rounded
    folders = {"colour", "depth"} if depth_channels else {"colour"}
    files = {"config.json", WEIGHTS}
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
    (tmp_path / WEIGHTS).unlink()
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


@pytest.mark.skipif(not (shipped_model().parent / WEIGHTS).is_file(), reason="no teacher")
def test_few_steps_take_the_shipped_student_and_more_its_teacher() -> None:
    student, teacher = WorldModel.load(shipped_model(4)), WorldModel.load(shipped_model(5))
    assert shipped_model() == shipped_model(4)
    assert student.sizes == teacher.sizes == CONFIGS["small"]
    moved = {n for n, value in teacher.state_dict().items() if not torch.equal(student.state_dict()[n], value)}
    parameters = dict(teacher.named_parameters())
    still = parameters.keys() - moved
    assert moved <= parameters.keys()  # and not the autoencoders, which are those of the teacher
    # A student is always told the action. Its layers for layouts are those of its teacher.
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

"""Means of checkpoints, and what one learned added to another, against the same by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from holdover_world.model.transformer import WorldModel
from holdover_world.training.mix import mix
from tests.holdover_world.small import small_codec, small_config, small_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints of the same autoencoders."""
    codec, made = small_codec(small_config(layers=2)), []
    for seed in range(3):
        model = small_model(seed, layers=2)
        model.codec = codec
        made.append(tmp_path_factory.mktemp("model"))
        model.save(made[-1])
    return made


def weights(folder: Path) -> dict[str, Tensor]:
    return WorldModel.load(folder, dtype=torch.float32).state_dict()


def test_a_mean_of_two(folders: list[Path], tmp_path: Path) -> None:
    mix(folders[0], folders[1], 0.25, tmp_path)
    one, two, found = (weights(folder) for folder in (*folders[:2], tmp_path))
    for name, value in found.items():
        assert torch.equal(value, (one[name] + 0.25 * (two[name] - one[name])).bfloat16().float()), name
    assert set(WorldModel.load(tmp_path).codec.autoencoders) == {"colour", "depth"}


def test_what_one_learned_is_added_to_another(folders: list[Path], tmp_path: Path) -> None:
    mix(folders[0], folders[1], 1.0, tmp_path, since=folders[2])
    one, two, three, found = (weights(folder) for folder in (*folders, tmp_path))
    for name, value in found.items():
        assert torch.equal(value, (one[name] + (two[name] - three[name])).bfloat16().float()), name


def test_a_difference_lies_in_the_folder_of_its_base(folders: list[Path], tmp_path: Path) -> None:
    base = small_model(2, layers=2)
    base.codec = WorldModel.load(folders[0]).codec
    base.save(tmp_path)
    mix(folders[0], folders[1], 0.5, tmp_path / "student", as_difference=True)
    mix(folders[0], folders[1], 0.5, tmp_path / "whole")
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["difference.safetensors"]
    read, whole, before = (weights(folder) for folder in (tmp_path / "student", tmp_path / "whole", tmp_path))
    for name, value in read.items():
        step = (whole[name] - before[name]).abs().amax(-1, keepdim=True) / 127
        assert ((value - whole[name]).abs() <= step + whole[name].abs() / 100).all(), name


def test_what_does_not_fit_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"share=1\.5 is not between 0 and 1"):
        mix(folders[0], folders[1], 1.5, tmp_path)
    small_model(layers=3).save(tmp_path / "larger")
    with pytest.raises(ValueError, match="larger has WorldConfig"):
        mix(folders[0], tmp_path / "larger", 0.5, tmp_path)
    small_model(1, layers=2).save(tmp_path / "other")
    with pytest.raises(ValueError, match="other was trained with other autoencoders"):
        mix(folders[0], tmp_path / "other", 0.5, tmp_path)

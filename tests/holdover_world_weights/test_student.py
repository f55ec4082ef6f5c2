"""The student that a wheel holds is, bit by bit, the one that the repository holds as a difference."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from holdover_world.loop.scenarios import shipped_model
from holdover_world.model.transformer import WorldModel

ROOT = Path(__file__).parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def build_hook() -> Any:
    spec = spec_from_file_location("hatch_build", ROOT / "packages/holdover-world-weights/hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder as a wheel installs it."""
    model, out = shipped_model().parent, tmp_path_factory.mktemp("model")
    (out / "student").mkdir()
    build_hook().write_student(model, out / "student")
    for part in ("config.json", "colour", "depth"):
        (out / part).symlink_to(model / part)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_wheels_student_is_the_repositorys(whole: Path, dtype: torch.dtype) -> None:
    expected, found = (WorldModel.load(path, dtype=dtype) for path in (shipped_model(), whole / "student"))
    assert found.sizes == expected.sizes
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert found.state_dict()[name].dtype == value.dtype
        assert torch.equal(found.state_dict()[name], value), name
    for modality, autoencoder in expected.codec.autoencoders.items():
        for name, value in autoencoder.state_dict().items():
            assert torch.equal(found.codec.autoencoders[modality].state_dict()[name], value), name


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    hook, values = build_hook(), torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    halfway = (values.bfloat16().view(torch.int16).int() << 16 | 0x8000).view(torch.float32)
    for some in (values, halfway, torch.tensor([0.0, -0.0, 3e38, 1e-40])):
        bits = hook.to_bfloat16(some.numpy())
        assert (bits.view(np.int16) == some.bfloat16().view(torch.int16).numpy()).all()
        assert (hook.from_bfloat16(bits) == some.bfloat16().float().numpy()).all()


def test_a_file_is_read_as_safetensors_wrote_it(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(2, 3).bfloat16(),
        "a": torch.tensor([[-7], [127]], dtype=torch.int8),
        "c": torch.ones(5),
    }
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    header, found = build_hook().read_safetensors(tmp_path / WEIGHTS)
    assert json.loads(header[8:])["__metadata__"] == {"format": "pt"}
    for name, value in load_file(tmp_path / WEIGHTS).items():
        raw = value.view(torch.int16).numpy().view(np.uint16) if value.dtype == torch.bfloat16 else value.numpy()
        assert found[name].dtype == raw.dtype
        assert (found[name] == raw).all()

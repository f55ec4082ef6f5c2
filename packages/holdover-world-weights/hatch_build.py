"""Makes the student whole when the wheel is built.

The repository holds the student as its difference from its teacher, in eight bits a weight: half the size of a
checkpoint. The wheel holds its weights, in bfloat16; the teacher has a wheel of its own. An editable installation reads
the files of the repository, and nothing is made for it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from numpy.typing import NDArray

WEIGHTS = "diffusion_pytorch_model.safetensors"
MODEL = "holdover_world_weights/model"


class StudentHook(BuildHookInterface[Any]):
    """Adds the whole student to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        model, self._made = Path(self.root, "src", MODEL), Path(tempfile.mkdtemp())
        write_student(model, self._made)
        for name in (WEIGHTS, "config.json"):
            build_data["force_include"][str(self._made / name)] = f"{MODEL}/student/{name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            shutil.rmtree(self._made)


def write_student(model: Path, out: Path) -> None:
    """Write the student's weights and configuration, from its teacher in ``model`` and the difference in
    ``model/student``.

    The weights are bit by bit those of `holdover_world.codec.checkpoints.add_difference`: teacher and difference are
    added in float32, and the sum is rounded to bfloat16, to the nearest, ties to even.
    """
    header, teacher = read_safetensors(model / WEIGHTS)
    _, difference = read_safetensors(model / "student/difference.safetensors")
    parts = []
    for name, value in teacher.items():
        added = difference[name].astype(np.float32) * difference[f"{name}.scale"]
        parts.append(to_bfloat16(from_bfloat16(value) + added))
    with (out / WEIGHTS).open("wb") as file:
        file.write(header)
        for part in parts:
            file.write(part.tobytes())
    shutil.copyfile(model / "config.json", out / "config.json")


def read_safetensors(file: Path) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """A file's header, and its tensors in the order of the file; bfloat16 as its bits, in uint16."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    described = json.loads(data[8:start])
    described.pop("__metadata__", None)
    types = {"BF16": np.uint16, "F32": np.float32, "I8": np.int8}
    tensors = {}
    for name, about in sorted(described.items(), key=lambda item: item[1]["data_offsets"][0]):
        first, last = about["data_offsets"]
        flat = np.frombuffer(data[start + first : start + last], types[about["dtype"]])
        tensors[name] = flat.reshape(about["shape"])
    return data[:start], tensors


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite values to the nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)

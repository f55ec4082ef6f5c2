"""The fast dtype of a machine, by the CPU flags that its kernel reports."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from holdover_world.loop.scenarios import shipped_model
from holdover_world.model.transformer import WorldModel
from holdover_world.runtime import fast_dtype

_CPU = Path("/proc/cpuinfo")


@pytest.mark.skipif(platform.machine() != "x86_64" or not _CPU.is_file(), reason="reads the flags of an x86 CPU")
def test_bfloat16_needs_instructions_for_it() -> None:
    flags = set(_CPU.read_text().partition("flags")[2].partition("\n")[0].split())
    assert fast_dtype() == (torch.bfloat16 if {"avx512_bf16", "amx_tile"} & flags else torch.float32)


def test_other_devices_compute_in_bfloat16() -> None:
    assert fast_dtype("cuda:1") == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_models_are_read_in_it(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    for module in ("model.transformer", "codec.latents"):
        monkeypatch.setattr(f"holdover_world.{module}.fast_dtype", lambda: dtype)
    model = WorldModel.load(shipped_model())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {p.dtype for a in model.codec.autoencoders.values() for p in a.parameters()} == {dtype}

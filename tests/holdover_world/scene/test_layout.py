"""Layouts on disk, and places in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from holdover_world.scene.layout import FILE, Layout
from tests.holdover_world.small import small_layout


def test_layouts_are_written_and_read(tmp_path: Path) -> None:
    layout = small_layout()
    assert Layout.load(tmp_path) is None
    layout.save(tmp_path)
    again = Layout.load(tmp_path)
    assert again is not None
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    for name in ("ground_GH", "corner_2", "boxes_M10", "parts_J10", "poses_TC3"):
        assert torch.equal(getattr(again, name), getattr(layout, name))
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:100])
    with pytest.raises(ValueError, match=r"layout\.npz is damaged .* record the clip again"):
        Layout.load(tmp_path)

"""Layouts on disk, and places in them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from holdover_world.scene.layout import FILE, Layout, Site, Sites, Track
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


def test_a_track_tells_where_its_recording_was() -> None:
    layout, poses = small_layout(), torch.arange(60).view(20, 3).double() / 10
    site = Track(layout, poses, torch.zeros(20, 2)).site(7)
    assert site.layout is layout
    assert (site.frame, site.pose_3.tolist()) == (7, poses[7].tolist())


def test_a_site_moves_in_its_own_direction() -> None:
    site = Site(small_layout(), torch.tensor([10.0, 5.0, math.pi / 2], dtype=torch.float64), 3)
    moved = site.moved(torch.tensor([4.0, 1.0, 0.5]), 8)  # 4 metres ahead, 1 to the left
    assert moved.frame == 11
    torch.testing.assert_close(moved.pose_3, torch.tensor([9.0, 9.0, math.pi / 2 + 0.5], dtype=torch.float64))
    ahead = site.ahead(torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(ahead[:, :2], torch.tensor([[10.0, 5.0], [10.0, 6.0]], dtype=torch.float64))


def test_sites_move_row_by_row_and_survive_a_file() -> None:
    layout = small_layout()
    here = Site(layout, torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64), 7)
    sites = Sites((here, None, here))
    moved = sites.moved(torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [3.0, 0.0, 0.0]]), 4)
    assert moved[0] is not None
    assert moved[1] is None
    assert moved[2] is not None
    assert [moved[0].pose_3[0].item(), moved[2].pose_3[0].item()] == [2.0, 4.0]
    assert moved.take([1, 2]) == (None, moved[2])
    again = Sites.from_state_dict(load(save(moved.state_dict())), rows=3)
    assert again[0] is not None
    assert again[1] is None
    assert again[0].frame == 11
    assert torch.equal(again[0].pose_3, moved[0].pose_3)
    assert torch.equal(again[0].layout.ground_GH, layout.ground_GH)
    assert torch.equal(again[0].layout.boxes_M10, layout.boxes_M10)


def test_without_a_layout_there_are_no_sites() -> None:
    none = Sites()
    assert none.moved(torch.zeros(2, 3), 4) == none.take([0]) == Sites.from_state_dict({}, rows=2) == ()
    assert none.state_dict() == {}

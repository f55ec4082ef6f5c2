"""Clips that are written and read, damaged, and recorded again. Needs no simulator."""

import json
from pathlib import Path

import numpy as np
import pytest

from holdover_world.scene import clips as module
from holdover_world.scene.cameras import RIG
from holdover_world.scene.clips import ClipWriter, clip_name, list_clips, open_dataset, read_cameras, read_clip
from holdover_world.scene.vehicles import normalise_action

CAMERAS = RIG[:3]
FRAMES = 20


def _write(folder: Path, seed: int = 7, frames: int = FRAMES) -> Path:
    """A clip whose brightness and depth grow frame by frame."""
    open_dataset(folder, CAMERAS)
    with ClipWriter(folder, "urban", seed, cameras=CAMERAS) as writer:
        for k in range(frames):
            rgb = {c.name: np.full((c.height, c.width, 3), 40 + 10 * k, np.uint8) for c in CAMERAS}
            depth = {c.name: np.full((c.height, c.width), 1.5 + k, np.float32) for c in CAMERAS}
            depth["front_wide"][0] = 655.35
            writer.add(rgb, depth, command=(k / 2, 0.001 * k), motion=(k / 3, 0.0), pose=(k, -k, k / 10))
        return writer.finish()


def test_round_trip(tmp_path: Path) -> None:
    path = _write(tmp_path)
    assert list_clips(tmp_path) == [path]
    assert path.name == clip_name("urban", 7) == "urban-000007"
    assert read_cameras(tmp_path) == CAMERAS
    clip = read_clip(path, depth=True)
    assert (clip.scenario, clip.seed) == ("urban", 7)
    assert set(clip.frames) == {camera.name for camera in CAMERAS}
    assert clip.depth is not None
    for camera in CAMERAS:
        assert clip.frames[camera.name].shape == (FRAMES, camera.height, camera.width, 3)
        expected = 40 + 10.0 * np.arange(FRAMES)
        assert np.abs(clip.frames[camera.name].mean(axis=(1, 2, 3)) - expected).max() < 2
        assert clip.depth[camera.name][:, -1, 0] == pytest.approx(1.5 + np.arange(FRAMES))
    assert clip.depth["front_wide"][:, 0] == pytest.approx(655.35)
    k = np.arange(FRAMES)
    np.testing.assert_array_equal(clip.actions, normalise_action(k / 2, 0.001 * k))
    np.testing.assert_array_equal(clip.poses, np.stack([k, -k, k / 10], axis=1))
    np.testing.assert_array_equal(clip.motion[:, 0], k / 3)


@pytest.mark.parametrize("start", [0, 1, 11, 12, 13, 19])
def test_part_of_a_clip(tmp_path: Path, start: int) -> None:
    path = _write(tmp_path)
    count = min(4, FRAMES - start)
    whole = read_clip(path, depth=True)
    part = read_clip(path, depth=True, cameras=["front_wide"], start=start, frames=count)
    assert list(part.frames) == ["front_wide"]
    np.testing.assert_array_equal(part.frames["front_wide"], whole.frames["front_wide"][start : start + count])
    assert part.depth is not None
    assert whole.depth is not None
    np.testing.assert_array_equal(part.depth["front_wide"], whole.depth["front_wide"][start : start + count])
    np.testing.assert_array_equal(part.actions, whole.actions[start : start + count])


def test_frames_out_of_range(tmp_path: Path) -> None:
    path = _write(tmp_path)
    for start, frames in ((-1, 2), (18, 3), (0, 0), (20, None)):
        with pytest.raises(ValueError, match="which has 20"):
            read_clip(path, start=start, frames=frames)


@pytest.mark.parametrize("name", ["front_wide.mp4", "front_wide.depth.mkv", "clip.parquet", "clip.json"])
@pytest.mark.parametrize("damage", ["cut", "noise", "gone"])
def test_damage_names_the_file(tmp_path: Path, name: str, damage: str) -> None:
    path = _write(tmp_path)
    file = path / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"no such format" * 9)
    with pytest.raises(FileNotFoundError if damage == "gone" else ValueError, match=name):
        read_clip(path, depth=True)


def test_a_clip_shorter_than_it_says(tmp_path: Path) -> None:
    path = _write(tmp_path)
    about = json.loads((path / "clip.json").read_text())
    (path / "clip.json").write_text(json.dumps({**about, "frames": FRAMES + 1}))
    with pytest.raises(ValueError, match=r"front_wide\.mp4 ends after 20 frames"):
        read_clip(path)


def test_unfinished_clips_leave_nothing(tmp_path: Path) -> None:
    open_dataset(tmp_path, CAMERAS)
    with ClipWriter(tmp_path, "urban", 1, cameras=CAMERAS):
        pass
    assert list_clips(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_a_clip_recorded_twice_is_replaced(tmp_path: Path) -> None:
    _write(tmp_path, frames=3)
    path = _write(tmp_path, frames=5)
    assert list_clips(tmp_path) == [path]
    assert len(read_clip(path).poses) == 5


def test_folders_that_are_no_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset\.json is missing"):
        list_clips(tmp_path)
    open_dataset(tmp_path, CAMERAS)
    with pytest.raises(ValueError, match="other cameras"):
        open_dataset(tmp_path, RIG)
    monkeypatch.setattr(module, "FORMAT", 2)
    with pytest.raises(ValueError, match="format 1"):
        list_clips(tmp_path)

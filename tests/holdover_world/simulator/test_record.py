"""The renderer against closed forms, and recordings. Skipped where nothing can be rendered."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdover_world.scene.cameras import RIG
from holdover_world.scene.clips import list_clips, read_clip, read_track
from holdover_world.scene.vehicles import EgoState
from holdover_world.simulator import record as module
from holdover_world.simulator.meshes import Mesh
from holdover_world.simulator.record import record


@pytest.fixture(scope="module")
def renderer() -> Iterator[Any]:
    pytest.importorskip("panda3d", reason="rendering needs Panda3D: make simulator")
    from holdover_world.simulator.render import Renderer

    try:
        renderer = Renderer()
    except RuntimeError as error:
        pytest.skip(str(error))
    yield renderer
    renderer.close()


def _ground() -> Mesh:
    mesh = Mesh()
    mesh.flat("plain", (-900.0, 900.0), (-900.0, 900.0), 0.0)
    return mesh


@pytest.mark.parametrize("camera", RIG, ids=lambda camera: camera.name)
def test_depth_of_the_ground(renderer: Any, camera: Any) -> None:
    renderer.load(_ground(), [])
    _, depth = renderer.render(EgoState(x=3.0, y=-2.0, yaw=0.3), [])
    # The lower of the two rows of samples of a pixel sees the nearer ground.
    row = np.arange(camera.height)
    up = (1 - 2 * (row + 0.75) / camera.height) * math.tan(math.radians(camera.fov / 2)) * camera.height / camera.width
    pitch = math.radians(camera.pitch)
    sinking = math.sin(pitch) - up * math.cos(pitch)
    visible = sinking > camera.position[2] / 80.0
    expected = camera.position[2] / sinking[visible]
    seen = depth[camera.name][visible]
    np.testing.assert_allclose(seen, np.broadcast_to(expected[:, None], seen.shape), rtol=2e-3)
    assert (depth[camera.name][0] > 655.0).all() == (sinking[0] < 0)


def test_left_is_left_and_up_is_up(renderer: Any) -> None:
    mesh = _ground()
    mesh.box((20.0, 8.0), (2.0, 2.0), (0.0, 4.0), (1.0, 0.0, 0.0))
    renderer.load(mesh, [])

    def red(camera: str, yaw: float = 0.0) -> tuple[float, float, int]:
        rgb, _ = renderer.render(EgoState(yaw=yaw), [])
        image = rgb[camera].astype(int)
        rows, columns = np.nonzero(image[..., 0] - image[..., 1:].max(axis=-1) > 60)
        return (rows.mean(), columns.mean(), len(rows)) if len(rows) else (0.0, 0.0, 0)

    row, column, count = red("front_wide")
    assert count > 0
    assert column < 64
    assert row < 36
    assert red("front_wide", yaw=0.2)[1] > column + 3  # turning left moves the scene to the right
    assert red("left_front")[2] > 0
    assert red("right_front")[2] == 0
    assert red("rear")[2] == 0
    assert red("rear", yaw=math.pi)[1] < 56  # what is on the left in front is on the left seen from behind as well


def test_pictures_are_those_of_the_rig_and_repeat(renderer: Any) -> None:
    from holdover_world.simulator.simulator import Simulator

    runs = []
    for _ in range(2):
        simulator = Simulator("urban", 3, renderer=renderer)
        frames = [simulator.reset(), simulator.step(8.0, 0.05), simulator.step(8.0, 0.05)]
        runs.append(frames)
        simulator.close()
    for first, again in zip(*runs, strict=True):
        assert first.ego == again.ego
        for camera in RIG:
            assert first.rgb[camera.name].shape == (camera.height, camera.width, 3)
            assert first.rgb[camera.name].dtype == np.uint8
            assert first.depth[camera.name].dtype == np.float32
            np.testing.assert_array_equal(first.rgb[camera.name], again.rgb[camera.name])
            np.testing.assert_array_equal(first.depth[camera.name], again.depth[camera.name])


def test_recording_is_resumable(renderer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_shared_renderer", lambda: renderer)
    first = record("highway", 1, tmp_path, frames=9)
    clip = read_clip(first[0], depth=True)
    assert len(clip.actions) == 9
    changed = np.flatnonzero((np.diff(clip.actions, axis=0) != 0).any(axis=1)) + 1
    assert set(changed) <= {4, 8}  # commands hold for the four frames of a piece
    track = read_track(first[0])
    assert track is not None
    assert np.array_equal(track.poses_T3, clip.poses)
    assert np.array_equal(track.motion_T2, clip.motion)
    assert track.layout.poses_TC3.shape[::2] == (9, 3)
    written = (first[0] / "clip.json").stat().st_mtime_ns
    both = record("highway", 2, tmp_path, frames=9)
    assert list_clips(tmp_path) == both
    assert (first[0] / "clip.json").stat().st_mtime_ns == written


def test_the_command_causes_its_frame(renderer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from holdover_world.scene.vehicles import denormalise_action, drive

    monkeypatch.setattr(module, "_shared_renderer", lambda: renderer)
    clip = read_clip(record("urban", 1, tmp_path, frames=12, depth=False)[0])
    speed, curvature = denormalise_action(clip.actions)
    for k in range(1, 12):
        (x, y, yaw), (v, bend) = clip.poses[k - 1], clip.motion[k - 1]
        state = drive(EgoState(x=x, y=y, yaw=yaw, speed=v, curvature=bend), speed[k], curvature[k])
        assert (state.x, state.y, state.yaw) == pytest.approx(tuple(clip.poses[k]), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scenario": "moon"}, "unknown scenario 'moon'"),
        ({"clips": 0}, "clips is 0: give 1 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"frames": 0}, "frames is 0"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_wrong_arguments(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"scenario": "urban", "clips": 1, **change}
    with pytest.raises(ValueError, match=message):
        record(arguments.pop("scenario"), arguments.pop("clips"), tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_without_panda3d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "panda3d.core", None)
    monkeypatch.delitem(sys.modules, "holdover_world.simulator.render", raising=False)
    with pytest.raises(ImportError, match="make simulator"):
        record("urban", 1, tmp_path / "new")
    assert not (tmp_path / "new").exists()

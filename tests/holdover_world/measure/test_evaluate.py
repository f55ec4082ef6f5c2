from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress

from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.measure import motion
from holdover_world.measure.evaluate import (
    Drive,
    cross_view,
    drive_clip,
    frechet,
    matching_pixels,
    run_evaluation,
)
from holdover_world.measure.fidelity import depth_errors
from holdover_world.measure.motion import GAP, SCALE, MotionReader, agreement, train_motion_reader, true_motion
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import FPS, RIG, Camera, camera_rays
from holdover_world.scene.clips import Clip, list_clips, read_clip
from tests.holdover_world.driving import CAMERAS, write_clips
from tests.holdover_world.small import small_config, small_model


def test_frechet_of_gaussians_that_differ_by_a_shift_and_a_scale() -> None:
    """By hand: a shift by d gives d², a scale by s gives (1 - s)² times the trace of the covariance."""
    first = np.random.default_rng(0).normal(size=(200, 5)) * [1, 2, 3, 4, 5]
    first -= first.mean(0)
    shift = np.array([1.0, 0.0, -2.0, 0.0, 0.5])
    assert frechet(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet(first, first + shift) == pytest.approx(5.25, abs=1e-6)
    assert frechet(first, 3 * first) == pytest.approx(4 * np.trace(np.cov(first, rowvar=False)))


def test_matching_pixels_of_a_zoom() -> None:
    """Two cameras that look the same way from one point: a pixel lies closer to the middle in the wider one."""
    wide = Camera(name="w", group="g", width=80, height=40, fov=90, yaw=0, pitch=0, position=(0, 0, 0))
    narrow = replace(wide, name="n", fov=2 * np.degrees(np.arctan(0.5)))
    where = matching_pixels(narrow, wide)
    x = (np.arange(80) + 0.5) / 40 - 1
    y = (np.arange(40) + 0.5) / 20 - 1
    np.testing.assert_allclose(where[..., 0], np.broadcast_to(x / 2, (40, 80)), atol=1e-12)
    np.testing.assert_allclose(where[..., 1], np.broadcast_to(y[:, None] / 2, (40, 80)), atol=1e-12)
    assert np.isfinite(matching_pixels(wide, narrow)[..., 0]).mean() == pytest.approx(0.25, abs=0.03)
    assert not np.isfinite(matching_pixels(wide, replace(wide, yaw=180))).any()


def panorama(camera: Camera) -> np.ndarray:
    """Four frames of a world infinitely far away, whose colour is a smooth function of direction."""
    x, y, z = np.moveaxis(camera_rays(camera), -1, 0)
    azimuth, elevation = np.arctan2(y, x), np.arctan2(z, np.hypot(x, y))
    colours = np.stack([np.sin(3 * azimuth), np.cos(2 * azimuth), np.sin(4 * elevation)], -1)
    return np.repeat((127.5 + 120 * colours).round().astype(np.uint8)[None], 4, 0)


def test_cameras_of_one_far_world_agree_and_mirrored_ones_do_not() -> None:
    frames = {camera.name: panorama(camera) for camera in RIG}
    clip = Clip("far", 0, frames, None, np.zeros((4, 2), np.float32), np.zeros((4, 3)), np.zeros((4, 2)))
    mirrored = {name: video[:, :, ::-1].copy() if "left" in name else video for name, video in frames.items()}
    rows = {tuple(row["cameras"]): row for row in cross_view([Drive("far", mirrored, None, clip)], RIG)}
    assert rows["front_wide", "front_narrow"]["share"] == pytest.approx(
        np.tan(np.radians(25)) ** 2 / np.tan(np.radians(50)) ** 2, rel=0.15
    )
    assert ("front_wide", "rear") not in rows
    assert all(row["simulator"] > 35 for row in rows.values())
    assert rows["front_wide", "left_front"]["generated"] < 20
    assert rows["front_wide", "right_front"]["generated"] == rows["front_wide", "right_front"]["simulator"]


def toy_clip(seed: int, frames: int = 41) -> Clip:
    """A clip in which the ground slides by at a speed, and the horizon to the side at a yaw rate."""
    rng = np.random.default_rng(seed)
    speed, rate = rng.uniform(2, 20), rng.uniform(-0.5, 0.5)
    time = np.arange(frames) / FPS
    column, row = np.arange(32), np.arange(16)
    moved = np.sin((column[None, None] + 10 * rate * time[:, None, None] + seed) * 0.8) * (row[:, None] < 8)
    slid = np.sin((row[:, None] - 0.3 * speed * time[:, None, None]) * 0.8) * (row[:, None] >= 8)
    grey = (127.5 + 100 * (moved + slid)).round().astype(np.uint8)
    video = np.repeat(grey[..., None], 3, -1)
    poses = np.stack([0 * time, 0 * time, rate * time], -1)
    motion = np.stack([np.full(frames, speed), np.full(frames, rate / speed)], -1)
    return Clip("toy", seed, {"front": video}, None, np.zeros((frames, 2), np.float32), poses, motion)


def test_motion_is_that_of_the_poses() -> None:
    clip = toy_clip(3)
    motion = true_motion(clip)
    assert motion.shape == (40 // GAP, 2)
    np.testing.assert_allclose(motion[:, 0], clip.motion[0, 0])
    np.testing.assert_allclose(motion[:, 1], clip.motion[0, 0] * clip.motion[0, 1])
    everywhere = true_motion(clip, every=1)
    assert len(everywhere) == 41 - GAP
    np.testing.assert_array_equal(everywhere[::GAP][: len(motion)], motion)


def test_the_reader_learns_to_read_motion() -> None:
    reader = train_motion_reader([toy_clip(seed) for seed in range(40)], "front", steps=150, batch=16)
    unseen = [toy_clip(seed) for seed in range(100, 130)]
    read = np.concatenate([reader.motion(clip.frames) for clip in unseen])
    true = np.concatenate([true_motion(clip) for clip in unseen])
    assert read.shape == true.shape
    assert agreement(read[:, 1], true[:, 1])["correlation"] > 0.8
    # It also reads pictures that are darker and less sharp than those it was trained on.
    dim = [0.4 * clip.frames["front"] + 0.4 * np.roll(clip.frames["front"], 1, 2) for clip in unseen]
    read = np.concatenate([reader.motion({"front": video.astype(np.uint8)}) for video in dim])
    assert agreement(read[:, 1], true[:, 1])["correlation"] > 0.8


def test_a_reader_is_calibrated_with_other_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader with a wrong slope and offset, and a yaw rate that never varies and so cannot be calibrated."""
    clips = [replace(clip, poses=0 * clip.poses) for clip in map(toy_clip, range(5))]
    truth = {id(clip.frames["front"]): true_motion(clip) for clip in clips}
    reader = MotionReader("front")
    monkeypatch.setattr(motion, "_pictures", lambda frames, t: torch.from_numpy(truth[id(frames)][t // GAP]).float())
    monkeypatch.setattr(
        reader, "forward", lambda true: (true * torch.tensor([0.8, 1.0]) + 0.5) / torch.from_numpy(SCALE)
    )
    for _ in range(2):  # the second time changes nothing
        reader.calibrate(clips[:3])
        np.testing.assert_allclose(reader.slope, [0.8, 1.0], atol=1e-5)
        np.testing.assert_allclose(reader.offset, [0.5, 0.0], atol=1e-4)
    for clip in clips[3:]:
        np.testing.assert_allclose(reader.motion(clip.frames), true_motion(clip) + np.array([0, 0.5]), atol=1e-4)
    with pytest.raises(ValueError, match="1 clips"):
        train_motion_reader(clips[:1], "front", steps=1)


def test_agreement_of_a_line() -> None:
    true = np.array([0.0, 1.0, 2.0, 3.0])
    assert agreement(0.5 * true + 7, true) == pytest.approx({"correlation": 1.0, "slope": 0.5})
    assert agreement(-true, true) == pytest.approx({"correlation": -1.0, "slope": -1.0})
    assert agreement(true, np.ones(4)) == {"correlation": None, "slope": None}


def test_depth_errors_by_hand() -> None:
    """Of five pixels one is the sky and one 100 m away; of the others one is right, one half, one 1.2 times too far."""
    true = np.array([[10.0, 20.0, 655.35], [99.9, 100.0, 5.0]])[:, ::-1]
    made = np.array([[10.0, 10.0, 1.0], [99.9 * 1.2, 1.0, 5.0]])[:, ::-1]
    found = depth_errors(made, true)
    assert found == pytest.approx({"abs_rel": (0.5 + 0.2) / 4, "within_1.25": 3 / 4})
    assert depth_errors(true / 1.3, true) == pytest.approx({"abs_rel": 1 - 1 / 1.3, "within_1.25": 0.0})
    assert depth_errors(true, np.full_like(true, 655.35)) == {"abs_rel": None, "within_1.25": None}
    assert depth_errors(true, np.zeros_like(true)) == {"abs_rel": None, "within_1.25": None}  # never measured


def test_the_evaluation_is_complete(model: WorldModel, tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips", 4 * (8 + 12))
    with Progress(disable=True) as progress:
        figures = run_evaluation(model, tmp_path, clips=clips, data=clips, reader_steps=2, progress=progress)
    assert [name.split("-")[0] for name in figures["clips"]] == ["highway", "urban", "uturn"]
    assert list(figures["horizons"]) == list(figures["depth"]) == ["0.5", "1", "2", "4"]
    assert figures["frechet"][0]["seconds"] == [0, 2]
    assert json.loads((tmp_path / "world.json").read_text()) == figures
    text = (tmp_path / "world.md").read_text()
    assert "| yaw rate |" in text
    assert "](world-crops.png)" in text
    with Image.open(tmp_path / "world-crops.png") as crops:  # three scenarios, three pictures each
        assert crops.width / crops.height == pytest.approx(2.6 / 2.1, rel=0.02)
    # Reconstruction, computed again from the frames after the first eight latent frames.
    squares = []
    for path in list_clips(clips):
        clip = read_clip(path, depth=True, start=32)
        videos = model.codec.decode(model.codec.encode(clip.frames, clip.depth))
        squares += [(videos[name][0].astype(float) - clip.frames[name]).ravel() ** 2 for name in videos]
    expected = 10 * np.log10(255**2 / np.concatenate(squares).mean())
    assert figures["reconstruction_psnr_db"] == pytest.approx(expected)
    # The errors of depth, computed again from a loop over each clip, decoded as one video.
    relative = []
    for path in list_clips(clips):
        clip = read_clip(path, depth=True)
        assert clip.depth is not None
        latents = model.codec.encode(
            {name: video[:32] for name, video in clip.frames.items()},
            {name: video[:32] for name, video in clip.depth.items()},
        )
        actions = torch.from_numpy(clip.actions).unflatten(0, (-1, 4)).mean(1)
        loop = ClosedLoop(model, latents, actions[None, :8])
        made = torch.cat([piece.latents for piece in loop.run(actions[8:11])], 1)
        for name, depth in model.codec.decode_depth(made, latents[:, -1]).items():
            now, true = depth[0, 8:12], clip.depth[name][40:44]
            relative.append((np.abs(now - true) / true)[true < 100])
    assert figures["depth"]["1"]["abs_rel"] == pytest.approx(np.concatenate(relative).mean(), rel=1e-5)
    assert f"| 1 s | {figures['depth']['1']['abs_rel']:.3f} |" in text
    with Progress(disable=True) as progress:
        guided = run_evaluation(model, tmp_path, clips=clips, data=clips, guidance=2, reader_steps=2, progress=progress)
    assert json.loads((tmp_path / "world-guided-2.json").read_text()) == guided
    assert guided["horizons"]["1"] != figures["horizons"]["1"]
    assert guided["action"]["simulator"] == figures["action"]["simulator"]


def test_a_model_without_depth_is_evaluated_without(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, 4 * (8 + 1), depth=False)
    model = small_model(sizes=small_config(cameras=CAMERAS, window=4, depth_channels=0))
    drive = drive_clip(model, list_clips(clips)[0], LoopConfig(), seed=0, chunks=1)
    assert drive.depth is None
    assert {name: video.shape for name, video in drive.made.items()} == {
        "front_wide": (4, 32, 48, 3),
        "rear": (4, 32, 32, 3),
    }

"""Layouts as cameras see them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from holdover_world.conditioning.drawn import GROUND, SKY, Around, Drawn, Scenery, draw
from holdover_world.conditioning.views import Rig
from holdover_world.config import WorldConfig
from holdover_world.loop.scenarios import shipped_clips
from holdover_world.scene.cameras import RIG, Camera, camera_rays
from holdover_world.scene.clips import list_clips, read_clip, read_track
from holdover_world.scene.depth import FAR
from holdover_world.scene.layout import Layout
from tests.holdover_world.small import small_layout

CPU = torch.device("cpu")


def rastered(layout: Layout, camera: Camera, poses_K3: Tensor, frames: list[int]) -> Drawn:
    """What one camera sees, pixels row by row."""
    rig = Rig.of(WorldConfig(cameras=(camera,)), CPU)
    drawn = draw(Around.of(layout, Scenery.of(rig), poses_K3[0, :2]), poses_K3, frames)
    depth, what = (torch.stack([rig.pictures(each[None])[0][0].flatten() for each in x]) for x in drawn[:2])
    colour = torch.stack([rig.pictures(drawn.colour_3KM[:, k])[0].flatten(1) for k in range(len(frames))], 1)
    return Drawn(depth, what, colour, drawn.cars)


def naive_draw(layout: Layout, camera: Camera, pose: Tensor, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Ray by ray and box by box, in double precision: the distance, and whether a box is hit."""
    rows = [(box.tolist(), None) for box in layout.boxes_M10]
    for part in layout.parts_J10.tolist():
        x, y, yaw = layout.poses_TC3[frame, int(part[0])].tolist()
        rows.append(([x + part[1] * math.cos(yaw), y + part[1] * math.sin(yaw), yaw, *part[3:]], part[0]))
    x, y, yaw = pose.tolist()
    turn = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    place = turn @ np.array(camera.position) + [x, y, 0]
    rays = camera_rays(camera, every=2) @ turn.T
    depth = np.where(rays[..., 2] < -1e-3, place[2] / np.maximum(-rays[..., 2], 1e-3), FAR).clip(max=FAR)
    # The ground is drawn per pixel, boxes per square of two by two pixels.
    hit = np.zeros(depth.shape, dtype=bool)
    for i, j in np.ndindex(depth.shape):
        nearest = FAR
        for (bx, by, heading, half_length, half_width, bottom, top, *_), _ in rows:
            back = np.array([[math.cos(heading), math.sin(heading)], [-math.sin(heading), math.cos(heading)]])
            low, high = -math.inf, math.inf
            origin = [*(back @ (place[:2] - [bx, by])), place[2] - (bottom + top) / 2]
            along = [*(back @ rays[i, j, :2]), rays[i, j, 2]]
            for o, d, half in zip(origin, along, (half_length, half_width, (top - bottom) / 2), strict=True):
                ends = sorted(((-half - o) / d, (half - o) / d)) if abs(d) > 1e-9 else None
                if ends is not None:
                    low, high = max(low, ends[0]), min(high, ends[1])
                elif abs(o) > half:
                    low = math.inf
            if low < high and low > 0.2:
                nearest = min(nearest, low)
        if nearest < FAR:
            depth[i, j], hit[i, j] = nearest, True
    return depth, hit


def test_boxes_are_where_rays_meet_them() -> None:
    """Against a naive ray caster: boxes ahead, beside, behind, overlapping, and one around the camera."""
    rng = np.random.default_rng(0)
    boxes = torch.tensor(
        [
            [*rng.uniform(-25, 25, 2), rng.uniform(-3, 3), *rng.uniform(0.3, 4, 2), *sorted(rng.uniform(0, 5, 2)), *c]
            for c in rng.uniform(0, 1, (14, 3))
        ],
        dtype=torch.float32,
    )
    boxes = torch.cat([boxes, torch.tensor([[0, 0, 0.3, 9, 9, 0, 6, 0.5, 0.5, 0.5]])])
    layout = small_layout(boxes, cars=2)
    poses, frames = torch.tensor([[0.0, 0.0, 0.0], [3.0, -2.0, 1.1]]), [2, 30]
    checked = 0
    for camera in (RIG[0], RIG[4], RIG[6]):
        drawn = rastered(layout, camera, poses, frames)
        for k in range(2):
            depth, hit = naive_draw(layout, camera, poses[k], frames[k])
            made = drawn.depth_KM[k].view(camera.height, camera.width)[::2, ::2].numpy()
            found = (drawn.what_KM[k] > GROUND).view(camera.height, camera.width)[::2, ::2].numpy()
            assert (found == hit).mean() > 0.997  # rays that graze an edge may round either way
            both = found & hit
            checked += int(both.sum())
            assert (np.abs(made[both] / depth[both] - 1) > 1e-3).sum() <= 0.01 * both.sum()
    assert checked > 600


def test_of_faces_in_one_plane_the_last_is_seen() -> None:
    """With any number of threads, because streams in the same layout must expect the same."""
    walls = torch.tensor([[12.0, 0.0, 0.0, 0.3, 20.0, 0.0, 4.0, n / 10, 0.9, 0.2] for n in range(10)])
    scenery = Scenery.of(Rig.of(WorldConfig(cameras=RIG[:1]), CPU))
    around = Around.of(small_layout(walls), scenery, torch.zeros(2))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for _ in range(10):
            what = draw(around, torch.zeros(3, 3), [2] * 3).what_KM
            walls_seen = what[(what > GROUND) & (what < 2 + 6 * len(walls))]
            assert set(((walls_seen.long() - 2) // 6).tolist()) == {9}
    finally:
        torch.set_num_threads(threads)


def test_drawn_layouts_are_what_the_renderer_saw() -> None:
    """Against the shipped recordings of the renderer: depth below 100 metres and colour, in every camera."""
    for path in list_clips(shipped_clips()):
        clip, track = read_clip(path, depth=True, frames=24), read_track(path)
        assert track is not None
        assert clip.depth is not None
        frames = [0, 11, 23]
        for camera in RIG:
            drawn = rastered(track.layout, camera, track.poses_T3[frames].float(), frames)
            made, true = drawn.depth_KM.numpy(), clip.depth[camera.name][frames].reshape(3, -1)
            near = true < 100
            assert (np.maximum(made / true, true / made)[near] < 1.25).mean() > 0.9, (path.name, camera.name)
            colour = (drawn.colour_3KM.numpy() + 1) * 127.5
            error = np.abs(colour - clip.frames[camera.name][frames].reshape(3, -1, 3).transpose(2, 0, 1)).mean()
            assert error < 30, (path.name, camera.name)
            sky = (drawn.what_KM == SKY).numpy()
            assert (sky == (true > 600)).mean() > 0.93, (path.name, camera.name)

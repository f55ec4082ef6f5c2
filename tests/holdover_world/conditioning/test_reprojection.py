from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdover_world.codec.autoencoder import Autoencoder
from holdover_world.conditioning.drawn import GROUND, Scenery, draw
from holdover_world.conditioning.ego import Ego
from holdover_world.conditioning.reprojection import LinearPath, look_up_in_layout, now_at
from holdover_world.conditioning.views import Move, Rig, look
from holdover_world.config import FRAMES, WorldConfig
from holdover_world.loop.scenarios import load_scenario, shipped_model
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import RIG, Camera, camera_axes, camera_rays
from holdover_world.scene.layout import Site
from tests.holdover_world.small import latents, small_layout, small_model


def test_the_linear_path_is_an_autoencoder_without_convolutions() -> None:
    """Fresh convolutions add nothing to the principal components."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(latent_channels=8, widths=(8, 16), encoder_blocks=1, decoder_blocks=1).eval()
    video = torch.rand(1, 8, 3, 16, 24) * 2 - 1
    autoencoder.take_principal_components(autoencoder.blocks(torch.rand(9, 8, 3, 16, 24) * 2 - 1))
    torch.nn.init.normal_(autoencoder.mean_Z)
    torch.nn.init.uniform_(autoencoder.std_Z, 0.5, 2)
    path = LinearPath(3, 8)
    path.take(autoencoder)
    with torch.no_grad():
        z = autoencoder.encode(video)
        camera = Camera(name="a", group="a", width=24, height=16, fov=90, yaw=0, pitch=0, position=(0, 0, 1))
        rig = Rig.of(
            WorldConfig(cameras=(camera,), patch=1, latent_channels=192, depth_channels=0), torch.device("cpu")
        )
        order = rig.views[0].order_M
        for n in range(2):
            shown = video[0, 4 * n : 4 * n + 4].transpose(0, 1).flatten(2)[..., order]
            torch.testing.assert_close(path.latents(shown), z[0, n].flatten(1).T, atol=1e-4, rtol=1e-4)
        newest = rig.pictures(path.newest(z[0, 1].flatten(1).T))[0]
        torch.testing.assert_close(newest, autoencoder.decode(z)[0, 7], atol=1e-4, rtol=1e-4)


def road(camera: Camera, x: float, y: float, yaw: float) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A painted plain as a camera sees it from a pose, and the pixels where a metre of it is two pixels high."""
    rays = camera_rays(camera)
    distance = np.where(rays[..., 2] < -1e-3, camera.position[2] / np.maximum(-rays[..., 2], 1e-3), np.inf)
    ego = np.where(np.isfinite(distance), distance, 0)[..., None] * rays + camera.position
    east = x + np.cos(yaw) * ego[..., 0] - np.sin(yaw) * ego[..., 1]
    north = y + np.sin(yaw) * ego[..., 0] + np.cos(yaw) * ego[..., 1]
    paint = np.stack([np.sin(east / 2), np.cos(north / 2), np.sin((east + north) / 3)])
    focal = camera.width / 2 / np.tan(np.radians(camera.fov) / 2)
    near = focal * camera.position[2] / (distance * np.linalg.norm(rays, axis=-1)) ** 2 > 2
    return np.where(np.isfinite(distance), paint, 0).astype(np.float32), near


def test_a_plain_looks_as_it_will() -> None:
    """In every camera, looked up in all others, against the plain as that camera sees it."""
    rig = Rig.of(WorldConfig(), torch.device("cpu"))
    cameras, grid = [view.camera for view in rig.views], rig.pixels
    pictures = [torch.from_numpy(road(camera, 0, 0, 0)[0]) for camera in cameras]
    poses = torch.tensor([[0.0, 0.0, 0.0], [1.5, 0.2, 0.2], [2.0, -0.5, -0.3]])
    points = Move.of(poses).points(rig.views, grid, grid.ground_M.expand(3, -1))
    all_values, all_found = look(rig.views, grid, pictures, points)
    elsewhere = 0
    for n, part in enumerate(grid.parts):
        found, order = torch.empty_like(all_found[:, part]), rig.views[n].order_M
        values = torch.empty_like(all_values[:, :, part])
        found[:, order], values[:, :, order] = all_found[:, part], all_values[:, :, part]
        alone = torch.empty_like(found)
        alone[:, order] = rig.views[n].project(points[:, :, part].flatten(1))[1].view(3, -1)
        elsewhere += int((found & ~alone).sum())
        assert (found | ~alone).all()
        for k, pose in enumerate(poses.tolist()):
            truth, near = road(cameras[n], *pose)
            told = found[k].numpy() & near.reshape(-1)
            error = np.abs(values[:, k].numpy() - truth.reshape(3, -1))[:, told]
            assert told.sum() > 0.5 * near.sum()
            assert np.percentile(error, 95) < (1e-5 if k == 0 else 0.06)
    assert elsewhere > 1000


def test_a_wall_comes_nearer_and_is_gone_through() -> None:
    """A wall ten metres ahead is five metres ahead after five metres. After fifteen metres the plain is open, and no
    part of it was seen. The depth is that of the shipped autoencoder."""
    model = WorldModel.load(shipped_model(), dtype=torch.float32)
    frames, depth = {}, {}
    for camera in RIG:
        down = np.maximum(-camera_rays(camera)[..., 2], 1e-6)
        ground = np.minimum(camera.position[2] / down, 10).astype(np.float32)
        depth[camera.name] = np.repeat(ground[None], 4, 0)
        frames[camera.name] = np.full((4, camera.height, camera.width, 3), 128, np.uint8)
    last = model.codec.encode(frames, depth)[:, -1]
    plane = next(p for p in model.sizes.planes if (p.modality, p.camera.name) == ("colour", "front_narrow"))
    metres, shares = [], []
    for gone in (5.0, 15.0):
        expected, seen, layout = model.reprojection(last, torch.tensor([[gone, 0.0, 0.0]]).expand(1, 4, 3))
        assert not layout.any()
        metres.append(np.median(model.codec.decode_depth(expected, last)["front_narrow"][0, -1, 8:28, 40:88]))
        shares.append(float(seen[0, 0, plane.tokens].mean()))
    assert metres[0] == pytest.approx(5, rel=0.1)
    assert metres[1] > 50
    assert shares[0] == 1
    assert shares[1] < 0.2


def test_a_street_is_nearer_to_what_is_expected_than_to_what_it_was() -> None:
    """After a third of a second the error in colour is less than two thirds of the error of the old picture."""
    model = WorldModel.load(shipped_model(), dtype=torch.float32)
    colour = slice(0, model.sizes.planes[7].start)
    for name in ("urban", "highway", "uturn"):
        scenario = load_scenario(name, model, chunks=1)
        shown, truth = scenario.start[:, :-1], scenario.start[:, -1:]
        ego, _ = Ego().moved(scenario.start_actions[:, :-1])
        expected, seen, _ = model.reprojection(shown[:, -1], ego.ahead(scenario.start_actions[:, -1:]))
        error = [(guess - truth)[:, :, colour].square().mean() for guess in (expected, shown[:, -1:])]
        assert error[0] < 0.67 * error[1], name
        assert 0.9 < seen.mean() <= 1


def test_cars_are_looked_up_where_they_were_and_what_is_hidden_is_not_seen() -> None:
    """The ego stands, and a car drives past a wall. The picture holds the place on the car of each of its points. The
    same places must be found on the car wherever it went."""
    wall = torch.tensor([[12.0, 0.0, 0.0, 0.3, 20.0, 0.0, 4.0, 0.2, 0.9, 0.2]])
    layout = small_layout(wall)
    rig = Rig.of(WorldConfig(cameras=RIG[:1]), torch.device("cpu"))
    view, rays = rig.views[0], rig.pixels.rays_3M
    site = Site(layout, torch.zeros(3, dtype=torch.float64), 2)
    around, what = now_at(site, Scenery.of(rig), torch.device("cpu"))
    poses, axes = torch.zeros(20, 3), torch.from_numpy(camera_axes(view.camera)).float()
    now, later = (draw(around, poses[: len(frames)], frames) for frames in ([2], range(3, 23)))
    assert torch.equal(what, now.what_KM[0])
    points = axes.T @ (rays * now.depth_KM[0]) + view.place_3[:, None]

    def on_the_car(points_3M: Tensor, frame: int) -> Tensor:
        x, y, yaw = layout.poses_TC3[frame, 0]
        dx, dy = points_3M[0] - x, points_3M[1] - y
        return torch.stack([dx * yaw.cos() + dy * yaw.sin(), dy * yaw.cos() - dx * yaw.sin(), points_3M[2]])

    marked = rig.pictures(torch.cat([on_the_car(points, 2), what[None]]))
    looked = look_up_in_layout(marked, around, site, poses, range(1, 21))
    assert torch.equal(looked.depth_KM, later.depth_KM)
    assert torch.equal(looked.drawn_3KM, later.colour_3KM)
    checked = 0
    for k in (3, 8):
        car, was = later.what_KM[k] >= 8, what >= 8  # the wall is the first box, the car the second
        told = car & (looked.seen_KM[k] == 1)
        body = on_the_car(axes.T @ (rays * later.depth_KM[k]) + view.place_3[:, None], 3 + k)
        assert (looked.colour_3KM[:, k, told] - body[:, told]).abs().median() < 0.15
        checked += int(told.sum())
        uncovered = was & ~car & (later.what_KM[k] > GROUND)
        assert not looked.seen_KM[k][was & ~car].any()  # what is behind it was hidden
        assert torch.equal(looked.colour_3KM[:, k, uncovered], later.colour_3KM[:, k, uncovered])
    assert checked > 100


@pytest.mark.parametrize("located", [False, True])
def test_latent_frames_by_themselves_are_those_of_the_window(located: bool) -> None:
    """Bit for bit, in any order, from a site that knows nothing yet or that was drawn before."""
    model = small_model()
    last, poses = latents(model, 1)[:, 0], torch.tensor([[0.3 * k, 0.01 * k, 0.02 * k] for k in range(12)])[None]
    boxes = torch.tensor([[12.0, n - 2.0, 0.1 * n, 0.3, 2.0, 0.0, 4.0, n / 10, 0.9, 0.2] for n in range(5)])
    layout = small_layout(boxes, cars=2)

    def sites() -> list[Site] | None:
        return [Site(layout, torch.tensor([1.0, 2.0, 0.1]).double(), 5)] if located else None

    once = sites()
    whole = model.reprojection(last, poses, once)
    for at in (once, sites()):
        for frames in ([2], [1, 0], [0, 1, 2]):
            chosen = poses.unflatten(1, (-1, FRAMES))[:, frames].flatten(1, 2)
            for each, expected in zip(model.reprojection(last, chosen, at, frames), whole, strict=True):
                assert torch.equal(each, expected[:, frames])

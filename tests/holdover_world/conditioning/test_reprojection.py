from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdover_world.codec.autoencoder import Autoencoder
from holdover_world.conditioning.drawn import Around, draw
from holdover_world.conditioning.ego import Ego
from holdover_world.conditioning.reprojection import LinearPath, look_up_in_layout
from holdover_world.conditioning.views import Move, View, look
from holdover_world.loop.scenarios import load_scenario, shipped_model
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import RIG, Camera, camera_axes, camera_rays
from holdover_world.scene.layout import Site
from tests.holdover_world.small import small_layout


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
        torch.testing.assert_close(path.latents(video[0]), z[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(path.newest(z[0, 1]), autoencoder.decode(z)[0, 7], atol=1e-4, rtol=1e-4)


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
    views = [View.of(camera, torch.device("cpu")) for camera in RIG]
    pictures = [torch.from_numpy(road(camera, 0, 0, 0)[0]) for camera in RIG]
    poses = torch.tensor([[0.0, 0.0, 0.0], [1.5, 0.2, 0.2], [2.0, -0.5, -0.3]])
    move = Move.of(poses)
    points = [move.points(view, view.pixels[0], view.pixels[1].expand(3, -1)) for view in views]
    elsewhere = 0
    for n, (values, found) in enumerate(look(views, pictures, points)):
        alone = look(views[n : n + 1], pictures[n : n + 1], points[n : n + 1])[0][1]
        elsewhere += int((found & ~alone).sum())
        assert (found | ~alone).all()
        for k, pose in enumerate(poses.tolist()):
            truth, near = road(RIG[n], *pose)
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
    camera = RIG[0]
    view = View.of(camera, torch.device("cpu"))
    site = Site(layout, torch.zeros(3, dtype=torch.float64), 2)
    poses = torch.zeros(20, 3)
    now = Around.of(layout, torch.zeros(1, 3), [2])
    drawn = draw(layout, view, now)
    axes = torch.from_numpy(camera_axes(camera)).float()
    points = axes.T @ (view.pixels[0] * drawn.depth_KM[0]) + view.place_3[:, None]

    def on_the_car(points_3M: Tensor, frame: int) -> Tensor:
        x, y, yaw = layout.poses_TC3[frame, 0]
        dx, dy = points_3M[0] - x, points_3M[1] - y
        return torch.stack([dx * yaw.cos() + dy * yaw.sin(), dy * yaw.cos() - dx * yaw.sin(), points_3M[2]])

    picture = on_the_car(points, 2).view(3, camera.height, camera.width)
    colours, depths, seen, own = look_up_in_layout([picture], [view], Move.of(poses), site, poses, range(1, 21))
    later = draw(layout, view, Around.of(layout, poses, list(range(3, 23))))
    torch.testing.assert_close(depths[0], later.depth_KM)
    torch.testing.assert_close(own[0], later.colour_3KM)
    checked = 0
    for k in (3, 8):
        car = (later.car_KM[k] == 0) & seen[0][k]
        body = on_the_car(axes.T @ (view.pixels[0] * later.depth_KM[k]) + view.place_3[:, None], 3 + k)
        assert (colours[0][:, k, car] - body[:, car]).abs().median() < 0.15
        checked += int(car.sum())
        uncovered = (drawn.car_KM[0] == 0) & (later.car_KM[k] < 0)
        assert not seen[0][k][uncovered].any()  # the wall behind it was hidden
        assert torch.equal(colours[0][:, k, uncovered], later.colour_3KM[:, k, uncovered])
    assert checked > 100

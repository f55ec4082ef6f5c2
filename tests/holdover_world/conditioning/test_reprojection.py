from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdover_world.codec.autoencoder import Autoencoder
from holdover_world.conditioning.motion import drive
from holdover_world.conditioning.reprojection import LinearPath
from holdover_world.conditioning.views import Move, View, look
from holdover_world.loop.scenarios import load_scenario, shipped_model
from holdover_world.model.kv_cache import Expected, KVCache
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import RIG, Camera, camera_rays
from holdover_world.scene.vehicles import EgoState, denormalise_action, normalise_action
from holdover_world.scene.vehicles import drive as drive_by_numbers
from tests.holdover_world.small import latents, small_model


def test_rows_drive_as_one_car_does() -> None:
    """Braking, speeding up and turning hard, a command for four frames; without a motion from the first command's."""
    rng = np.random.default_rng(0)
    commands = np.stack([rng.uniform(0, 30, (3, 6)), rng.uniform(-0.2, 0.2, (3, 6))], -1)
    actions = torch.from_numpy(normalise_action(commands[..., 0], commands[..., 1]))
    start = torch.tensor([[20.0, 0.0], [3.0, 0.1], [12.0, -0.02]])
    for motion in (start, None):
        poses, after = drive(motion, actions)
        for row in range(3):
            speed, curvature = commands[row, 0] if motion is None else motion[row].tolist()
            state, expected = EgoState(speed=float(speed), curvature=float(curvature)), []
            for frame in range(24):
                state = drive_by_numbers(state, *map(float, commands[row, frame // 4]))
                expected.append([state.x, state.y, state.yaw])
            np.testing.assert_allclose(poses[row], expected, rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(after[row], [state.speed, state.curvature], rtol=1e-4, atol=1e-5)


def test_the_linear_path_is_an_autoencoder_without_convolutions() -> None:
    """One whose convolutions are as they begin says nothing beside its principal components."""
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
    """What a camera sees of a painted plain from a pose, and where a metre of it is two pixels high, or more."""
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
    """In every camera, from every other, against the plain as it is seen from there."""
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
    """Ten metres ahead; five metres on, five, by the shipped autoencoder of depth; and fifteen metres on nothing that
    was seen: the open plain."""
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
    """In recorded clips, after a third of a second: two thirds of the error in colour of what was there, or less."""
    model = WorldModel.load(shipped_model(), dtype=torch.float32)
    colour = slice(0, model.sizes.planes[7].start)
    for name in ("urban", "highway", "uturn"):
        scenario = load_scenario(name, model, chunks=1)
        shown, truth = scenario.start[:, :-1], scenario.start[:, -1:]
        cache = KVCache(model.sizes.context)
        cache.commit(shown, scenario.start_actions[:, :-1])
        assert cache.motion is not None
        poses, _ = drive(cache.motion, scenario.start_actions[:, -1:])
        expected, seen, _ = model.reprojection(shown[:, -1], poses)
        error = [(guess - truth)[:, :, colour].square().mean() for guess in (expected, shown[:, -1:])]
        assert error[0] < 0.67 * error[1], name
        assert 0.9 < seen.mean() <= 1


def test_expectations_are_worked_out_once_for_each_action() -> None:
    """Frame by frame the same as all at once, whatever was asked before."""
    model, asked = small_model(), []
    cache, actions = model.new_cache(), torch.tensor([[[0.3, 0.1], [0.4, 0.1]]])
    model(latents(model, 2), sigma=0.0, action_BFA=actions, cache=cache, write=True)
    assert cache.motion is not None
    assert torch.equal(cache.motion, drive(None, actions)[1])

    def expect(last: Tensor, poses: Tensor, sites: Any, passed: int) -> Expected:
        asked.append(poses.shape[1])
        assert sites is None
        assert passed + poses.shape[1] == 4 * told.shape[1]
        return model.reprojection(last, poses, sites, passed)

    def fresh(actions: Tensor) -> Expected:
        return model.reprojection(cache.last, drive(cache.motion, actions)[0])  # type: ignore[arg-type]

    later = torch.tensor([[[0.3, 0.1], [0.9, -0.5]]])
    other = torch.tensor([[[0.5, 0.1], [0.9, -0.5]]])
    steps = (actions, [8]), (actions.clone(), []), (later, [4]), (later, []), (other, [8]), (other[:, :1], [4])
    for told, worked_out in steps:
        asked.clear()
        found = cache.expect(told, expect)
        for each, again, truth in zip(found, cache.fork().expect(told, expect), fresh(told), strict=True):
            torch.testing.assert_close(each, truth)
            assert torch.equal(each, again)
        assert asked == worked_out


def test_what_comes_begins_where_the_ego_was_driven_not_where_its_pictures_show_it() -> None:
    """A window was committed that shows one drive, another was carried out; by cars that are driven by numbers."""
    model = small_model()
    first, shown, done, later = (torch.tensor([[a, b]]) for a, b in (
        ([0.3, 0.1], [0.3, 0.1]),
        ([0.3, 0.1], [0.3, 0.1]),
        ([0.3, 0.1], [0.1, -0.4]),
        ([0.2, -0.4], [0.2, 0.3]),
    ))  # fmt: skip
    asked: list[Tensor] = []

    def expect(last: Tensor, poses: Tensor, sites: Any, passed: int) -> Expected:
        asked.append(poses)
        return model.reprojection(last, poses, sites, passed)

    def driven(state: EgoState, actions: Tensor) -> tuple[EgoState, list[list[float]]]:
        seen = []
        for speed, curvature in zip(*denormalise_action(actions[0].numpy()), strict=True):
            for _ in range(4):
                state = drive_by_numbers(state, speed, curvature)
                seen.append([state.x, state.y, state.yaw])
        return state, seen

    cache = model.new_cache()
    for actions in (first, shown):
        model(latents(model, 2), sigma=0.0, action_BFA=actions, cache=cache, write=True)
    cache.carried_out(done)
    twin = KVCache(cache.capacity)
    twin.load_state_dict(cache.state_dict())
    speed, curvature = (float(x[0]) for x in denormalise_action(first[0].numpy()))
    begun, _ = driven(EgoState(speed=speed, curvature=curvature), first)
    picture, _ = driven(begun, shown)
    ego, _ = driven(begun, done)
    _, poses = driven(ego, later)
    cos, sin = np.cos(picture.yaw), np.sin(picture.yaw)
    turned = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    expected = (np.array(poses) - [picture.x, picture.y, picture.yaw]) @ turned.T
    for each in (cache, twin, cache.fork(), cache.take([0])):
        each.expect(later, expect)
        np.testing.assert_allclose(asked[-1][0], expected, rtol=1e-3, atol=2e-3)
    cache.carried_out(shown)  # as if nothing else had been done
    assert cache.pose is not None
    assert not cache.pose.any()

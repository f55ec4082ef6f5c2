"""The ego of a stream against single cars that are driven in plain numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from holdover_world.conditioning.ego import Ego
from holdover_world.conditioning.motion import drive
from holdover_world.scene.vehicles import EgoState, denormalise_action, normalise_action
from holdover_world.scene.vehicles import drive as drive_by_numbers


def driven(state: EgoState, actions_1FA: Tensor) -> tuple[EgoState, list[list[float]]]:
    """A car after these actions, each held for four video frames, and its poses on the way."""
    seen = []
    for speed, curvature in zip(*denormalise_action(actions_1FA[0].numpy()), strict=True):
        for _ in range(4):
            state = drive_by_numbers(state, speed, curvature)
            seen.append([state.x, state.y, state.yaw])
    return state, seen


def told(*actions: tuple[float, float]) -> Tensor:
    return torch.tensor([actions])


@pytest.mark.parametrize("known", [True, False])
def test_rows_drive_as_one_car_does(known: bool) -> None:
    """With braking, speeding up and hard turns. Without a motion the first command holds from the start."""
    rng = np.random.default_rng(0)
    commands = np.stack([rng.uniform(0, 30, (3, 6)), rng.uniform(-0.2, 0.2, (3, 6))], -1)
    actions = torch.from_numpy(normalise_action(commands[..., 0], commands[..., 1]))
    motion = torch.tensor([[20.0, 0.0], [3.0, 0.1], [12.0, -0.02]]) if known else None
    poses, after = drive(motion, actions)
    for row in range(3):
        speed, curvature = motion[row].tolist() if motion is not None else commands[row, 0]
        state, expected = driven(EgoState(speed=float(speed), curvature=float(curvature)), actions[row : row + 1])
        np.testing.assert_allclose(poses[row], expected, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(after[row], [state.speed, state.curvature], rtol=1e-4, atol=1e-5)


def test_it_goes_on_from_where_it_drove() -> None:
    actions = told((0.3, 0.1), (0.1, -0.4))
    ego, end = Ego().moved(actions)
    assert ego.pose_B3 is None
    assert torch.equal(ego.motion_B2, drive(None, actions)[1])
    assert torch.equal(end, drive(None, actions)[0][:, -1])
    later = told((0.2, 0.3))
    assert torch.equal(ego.ahead(later), drive(ego.motion_B2, later)[0])


def test_frames_may_show_another_drive_than_was_carried_out() -> None:
    """Coming poses start where the ego was driven, and are relative to where the newest frame shows it."""
    first, shown, done, later = (
        told(a, b)
        for a, b in (
            ((0.3, 0.1), (0.3, 0.1)),
            ((0.3, 0.1), (0.3, 0.1)),
            ((0.3, 0.1), (0.1, -0.4)),
            ((0.2, -0.4), (0.2, 0.3)),
        )
    )
    ego, end = Ego().moved(first)[0].moved(shown, done)
    speed, curvature = (float(x[0]) for x in denormalise_action(first[0].numpy()))
    begun, _ = driven(EgoState(speed=speed, curvature=curvature), first)
    picture, poses = driven(begun, shown)
    np.testing.assert_allclose(end[0, 2], poses[-1][2] - begun.yaw, atol=1e-4)
    _, poses = driven(driven(begun, done)[0], later)
    cos, sin = np.cos(picture.yaw), np.sin(picture.yaw)
    turned = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    expected = (np.array(poses) - [picture.x, picture.y, picture.yaw]) @ turned.T
    for each in (ego, Ego.from_state_dict(ego.state_dict()), ego.take([0])):
        np.testing.assert_allclose(each.ahead(later)[0], expected, rtol=1e-3, atol=2e-3)
    same, _ = Ego().moved(first)[0].moved(shown, shown)
    assert same.pose_B3 is not None
    assert not same.pose_B3.any()


def test_rows_are_taken() -> None:
    ego, _ = Ego().moved(torch.tensor([[[0.3, 0.1]], [[0.2, 0.0]]]), torch.tensor([[[0.3, 0.1]], [[0.1, 0.4]]]))
    assert ego.motion_B2 is not None
    assert ego.pose_B3 is not None
    one = ego.take([1])
    assert torch.equal(one.motion_B2, ego.motion_B2[1:])
    assert torch.equal(one.pose_B3, ego.pose_B3[1:])
    nothing = Ego()
    assert nothing.take([0]) == nothing == Ego.from_state_dict(nothing.state_dict())

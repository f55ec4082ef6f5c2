"""How the ego will move under actions that are tensors, as `holdover.world.vehicles` moves it under numbers.

Shape suffixes: B batch, F latent frames, A dimensions of the action, of which the first two move the ego.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from holdover.world.autoencoder import FRAMES
from holdover.world.cameras import FPS
from holdover.world.vehicles import (
    CURVATURE_KNEE,
    MAX_ACCELERATION,
    MAX_BRAKING,
    MAX_CURVATURE,
    MAX_CURVATURE_RATE,
    MAX_LATERAL_ACCELERATION,
    MAX_SPEED,
)


def drive(motion_B2: Tensor, action_BFA: Tensor) -> tuple[Tensor, Tensor]:
    """Where the ego will be at every video frame of the latent frames to come: `vehicles.drive`, a step per frame.

    Args:
        motion_B2: its speed (m/s) and curvature (1/m) now.
        action_BFA: normalised actions.

    Returns:
        Its pose (x, y, yaw) in its present coordinates, ``[B, 4*F, 3]``, and its motion in the end.
    """
    speed, curvature = motion_B2.unbind(-1)
    commands = commanded(action_BFA).repeat_interleave(FRAMES, 1).unbind(1)
    x = y = yaw = torch.zeros_like(speed)
    poses = []
    for command_B2 in commands:
        faster = (command_B2[:, 0] - speed).clamp(-MAX_BRAKING / FPS, MAX_ACCELERATION / FPS)
        sharper = (command_B2[:, 1] - curvature).clamp(-MAX_CURVATURE_RATE / FPS, MAX_CURVATURE_RATE / FPS)
        grip = MAX_LATERAL_ACCELERATION / (speed + faster).clamp(min=1e-3).square()
        sharper = torch.clamp(curvature + sharper, -grip, grip) - curvature
        distance = (speed + faster / 2) / FPS
        turn = (curvature + sharper / 2) * distance
        chord = distance * torch.sinc(turn / 2 / math.pi)
        x, y = x + chord * torch.cos(yaw + turn / 2), y + chord * torch.sin(yaw + turn / 2)
        speed, curvature, yaw = speed + faster, curvature + sharper, yaw + turn
        poses.append(torch.stack([x, y, yaw], -1))
    return torch.stack(poses, 1), torch.stack([speed, curvature], -1)


def commanded(action_BFA: Tensor) -> Tensor:
    """`vehicles.denormalise_action`: commanded speed and curvature ``[..., 2]``, within their bounds."""
    speed, turn = action_BFA[..., 0].float().clamp(0, 1), action_BFA[..., 1].float().clamp(-1, 1)
    curvature = torch.sinh(turn * math.asinh(MAX_CURVATURE / CURVATURE_KNEE)) * CURVATURE_KNEE
    return torch.stack([speed * MAX_SPEED, curvature], -1)

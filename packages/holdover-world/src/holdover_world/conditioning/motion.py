"""Where the ego will be under actions given as tensors: `holdover_world.scene.vehicles`, row by row.

Shape suffixes: B batch, F latent frames, A dimensions of the action, of which the first two move the ego.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdover_world.config import FRAMES
from holdover_world.scene.vehicles import EgoState, denormalise_action
from holdover_world.scene.vehicles import drive as drive_one


def drive(motion_B2: Tensor | None, action_BFA: Tensor) -> tuple[Tensor, Tensor]:
    """Drive on, one command per latent frame.

    Args:
        motion_B2: the present speed (m/s) and curvature (1/m); None: those that the first action commands.
        action_BFA: normalised actions.

    Returns:
        The pose (x, y, yaw) in every video frame relative to the present one, ``[B, 4*F, 3]``, and the motion at the
        end.
    """
    commands = zip(*(each.tolist() for each in denormalise_action(action_BFA[..., :2].double().cpu())), strict=True)
    poses, motion = [], []
    for row, (speeds, curvatures) in enumerate(commands):
        speed, curvature = (speeds[0], curvatures[0]) if motion_B2 is None else motion_B2[row].tolist()
        state, seen = EgoState(speed=speed, curvature=curvature), []
        for command in zip(speeds, curvatures, strict=True):
            for _ in range(FRAMES):
                state = drive_one(state, *command)
                seen.append((state.x, state.y, state.yaw))
        poses.append(seen)
        motion.append((state.speed, state.curvature))
    return torch.tensor(poses, device=action_BFA.device), torch.tensor(motion, device=action_BFA.device)

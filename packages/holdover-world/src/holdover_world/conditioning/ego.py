"""How the ego moves, and where it is.

Shape suffixes: B batch, F latent frames, K video frames, A dimensions of the action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from holdover_world.conditioning.motion import drive
from holdover_world.scene.poses import placed, seen_from


@dataclass(frozen=True)
class Ego:
    """The egos of one batch, after the newest committed latent frame.

    Attributes:
        motion_B2: speed (m/s) and curvature (1/m); None before the first action, whose command then holds from the
            start.
        pose_B3: where the ego is (x, y, yaw), relative to the pose that the newest committed latent frame shows; None
            where the two are the same.
    """

    motion_B2: Tensor | None = None
    pose_B3: Tensor | None = None

    def ahead(self, action_BFA: Tensor) -> Tensor:
        """Poses ``[B, K, 3]`` under these actions, relative to the pose that the newest latent frame shows."""
        return placed(self.pose_B3, drive(self.motion_B2, action_BFA)[0])

    def moved(self, action_BFA: Tensor, done_BFA: Tensor | None = None) -> tuple[Ego, Tensor]:
        """The ego after newly committed latent frames.

        Args:
            action_BFA: the actions that the frames show.
            done_BFA: the actions that the ego carried out meanwhile; by default those that the frames show.

        Returns:
            The ego, and the pose ``[B, 3]`` that the last of these frames shows, relative to the newest frame before.
        """
        shown_BK3, motion_B2 = drive(self.motion_B2, action_BFA)
        end_B3, pose_B3 = placed(self.pose_B3, shown_BK3)[:, -1], None
        if done_BFA is not None:
            done_BK3, motion_B2 = drive(self.motion_B2, done_BFA)
            pose_B3 = seen_from(shown_BK3[:, -1], done_BK3[:, -1])
        return Ego(motion_B2, pose_B3), end_B3

    def take(self, rows: Sequence[int]) -> Ego:
        """The egos of some rows."""
        return Ego(*(None if each is None else each[rows] for each in (self.motion_B2, self.pose_B3)))

    def state_dict(self) -> dict[str, Tensor]:
        known = {"motion": self.motion_B2, "pose": self.pose_B3}
        return {name: tensor for name, tensor in known.items() if tensor is not None}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> Ego:
        """The reverse of `state_dict`."""
        return cls(tensors.get("motion"), tensors.get("pose"))

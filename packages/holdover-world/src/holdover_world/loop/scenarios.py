"""Scenarios to drive: a start from a recorded clip, scripted or steady actions, and what the simulator showed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdover_world.codec.checkpoints import WEIGHTS
from holdover_world.loop.config import LoopConfig
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.clips import frame_count, list_clips, read_clip, read_track
from holdover_world.scene.layout import Track

KINDS = ("urban", "highway", "uturn")
STEADY = "-steady"
NAMES = tuple(kind + suffix for suffix in ("", STEADY) for kind in KINDS)
#: Steady drives of a kind begin in clips of another kind, if there are any: on a road without bends.
_STEADY_CLIPS = {"highway": "straight"}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A start and the actions that follow.

    Attributes:
        name: the kind of clip, with "-steady" if the action is constant.
        start: clean latents ``[1, F, N, P]`` of two windows.
        start_actions: their normalised actions ``[1, F, A]``.
        actions: one normalised action per chunk, ``[G, A]``.
        truth: what the simulator showed under these actions, per camera ``uint8 [T, height, width, 3]``; None for a
            steady drive, which was not recorded.
        track: where the start was recorded; None if its clip has no layout.
    """

    name: str
    start: Tensor
    start_actions: Tensor
    actions: Tensor
    truth: Mapping[str, NDArray[np.uint8]] | None
    track: Track | None = None

    def plan(self, chunk: int) -> Tensor:
        """The oracle plan of a chunk, ``[T, A]``: a plan that is always kept, because it is all that follows."""
        return self.actions[chunk + 1 :]

    @property
    def steady(self) -> bool:
        return self.truth is None

    def first(self, chunks: int, frames: int) -> Scenario:
        """The first chunks of the scenario, of ``frames`` video frames each."""
        truth = self.truth and {name: video[: chunks * frames] for name, video in self.truth.items()}
        return replace(self, actions=self.actions[:chunks], truth=truth)


def shipped_model(steps: int = LoopConfig.steps) -> Path:
    """The folder of the trained model for this many denoising steps: up to four take the student, more the teacher.

    Raises:
        FileNotFoundError: its package is not installed.
    """
    path = _weights() / "model"
    if steps <= LoopConfig.steps:
        return path / "student"
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"more than {LoopConfig.steps} denoising steps take the teacher, which is a package of its own: "
            "pip install 'holdover-world[teacher]'"
        )
    return path


def shipped_clips() -> Path:
    """The folder of the recorded clips that come with the trained models.

    Raises:
        FileNotFoundError: their package is not installed.
    """
    return _weights() / "clips"


def first_clip(folder: Path, kind: str, frames: int) -> Path:
    """The first clip of a kind that has at least this many frames.

    Raises:
        ValueError: there is no such clip.
    """
    found = [clip for clip in list_clips(folder) if clip.name.startswith(f"{kind}-")]
    if not found:
        command = f"holdover world record --scenario {kind} --out {folder}"
        raise ValueError(f"{folder} holds no {kind} clip; record one: {command}")
    for clip in found:
        if frame_count(clip) >= frames:
            return clip
    raise ValueError(f"no {kind} clip in {folder} has {frames} frames; record longer ones or ask for fewer chunks")


def load_scenario(name: str, model: WorldModel, *, clips: Path | None = None, chunks: int = 60) -> Scenario:
    """Load a scenario from the first clip of its kind.

    Args:
        name: one of `NAMES`.
        model: the model that will be driven.
        clips: a folder of recordings; by default the installed one.
        chunks: the number of actions. A scripted scenario needs a recording of that length, a steady one does not.

    Raises:
        ValueError: there is no such scenario, no clip of its kind, or no clip that is long enough.
    """
    if name not in NAMES:
        raise ValueError(f"scenario {name!r} is not one of {', '.join(NAMES)}")
    if chunks < 1:
        raise ValueError(f"chunks={chunks}: give at least 1")
    folder = clips or shipped_clips()
    kind, steady = name.removesuffix(STEADY), name.endswith(STEADY)
    sizes = model.sizes
    start, per = 2 * sizes.window, sizes.frames_per_latent
    pieces = start if steady else start + chunks
    own = _STEADY_CLIPS.get(kind, kind) if steady else kind
    found = own if any(clip.name.startswith(f"{own}-") for clip in list_clips(folder)) else kind
    clip = first_clip(folder, found, pieces * per)
    cameras = [camera.name for camera in sizes.cameras]
    recording = read_clip(clip, cameras=cameras, frames=None if steady else pieces * per)
    actions = _per_piece(recording.actions, per)
    begun = read_clip(clip, cameras=cameras, frames=start * per, depth="depth" in sizes.modalities)
    latents = model.codec.encode(begun.frames, begun.depth)
    track = read_track(clip)
    if steady:
        action = _steady_action(kind, actions, start)
        follow, truth = action.expand(chunks, -1), None
    else:
        follow = actions[start:]
        truth = {name: video[start * per :] for name, video in recording.frames.items()}
    return Scenario(
        name=name,
        start=latents,
        start_actions=actions[None, :start],
        actions=follow,
        truth=truth,
        track=track and track.to(latents.device),
    )


def _weights() -> Path:
    try:
        return Path(str(files("holdover_world_weights")))
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "the trained models and clips are a package of their own: pip install holdover-world-weights"
        ) from error


def _per_piece(actions: NDArray[Any], per: int) -> Tensor:
    """The mean action of each latent frame ``[T / per, A]``."""
    whole = len(actions) // per * per
    return torch.from_numpy(actions[:whole]).float().view(whole // per, per, -1).mean(1)


def _steady_action(kind: str, actions: Tensor, start: int) -> Tensor:
    """A constant action that continues the start of a clip: its speed, straight on; for a U-turn, the turn itself."""
    if kind == "uturn":
        turn = actions[:, 1].abs()
        turning = actions[turn >= 0.9 * turn.max()]
        return turning[len(turning) // 2]
    return torch.stack([actions[:start, 0].mean(), torch.zeros(())])

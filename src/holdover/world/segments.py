"""Segments of recorded clips, as training takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from holdover.world.clips import Clip, list_clips, read_clip
from holdover.world.config import WorldConfig
from holdover.world.latents import patchify


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # [B, F, N, P]
    actions: Tensor  # [B, F, A]


class Segments:
    """Random segments of recorded clips.

    Decoded clips are kept in memory, up to ``keep_bytes``; decoding every segment anew would take a tenth of a step.
    """

    def __init__(self, folder: Path, config: WorldConfig, *, keep_bytes: int = 4 << 30) -> None:
        self.config = config
        self._kept: dict[Path, Clip] = {}
        self._room = keep_bytes
        self.clips = list_clips(folder)
        if not self.clips:
            raise ValueError(f"{folder} holds no clips; record some with `holdover world record --out {folder}`")

    def read(self, clip: Path, start: int, latent_frames: int) -> Clip:
        """A segment that begins at video frame ``start``."""
        frames = latent_frames * self.config.frames_per_latent
        if clip not in self._kept and self._room > 0:
            self._kept[clip] = read_clip(clip)
            self._room -= sum(video.nbytes for video in self._kept[clip].frames.values())
        if clip not in self._kept:
            return read_clip(clip, start=start, frames=frames)
        whole, part = self._kept[clip], slice(start, start + frames)
        return replace(
            whole,
            frames={name: video[part] for name, video in whole.frames.items()},
            actions=whole.actions[part],
            poses=whole.poses[part],
            motion=whole.motion[part],
        )

    def sample(self, rng: np.random.Generator, batch: int, latent_frames: int) -> list[Clip]:
        per = self.config.frames_per_latent
        segments = []
        for _ in range(batch):
            clip = self.clips[rng.integers(len(self.clips))]
            length = json.loads((clip / "clip.json").read_text())["frames"]
            if length < latent_frames * per:
                raise ValueError(f"{clip} has {length} frames; training needs {latent_frames * per} or more")
            # Commands change where latent frames begin, so that none straddles two commands.
            start = int(rng.integers((length - latent_frames * per) // per + 1)) * per
            segments.append(self.read(clip, start, latent_frames))
        return segments

    def batch(self, segments: Sequence[Clip], device: str | torch.device) -> Batch:
        """Segments of one length, as the model takes them."""
        names = [camera.name for camera in self.config.cameras]
        frames = {name: torch.from_numpy(np.stack([s.frames[name] for s in segments])) for name in names}
        latents = patchify(frames, self.config)
        actions = torch.from_numpy(np.stack([s.actions for s in segments]))
        actions = actions.unflatten(1, (-1, self.config.frames_per_latent)).mean(2)
        return Batch(latents.to(device), actions.to(device))

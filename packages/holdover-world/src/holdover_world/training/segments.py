"""Segments of recorded clips, as training takes them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdover_world.codec.autoencoder import DECODING
from holdover_world.codec.latents import Codec
from holdover_world.config import FRAMES
from holdover_world.model.history import WorldHistory
from holdover_world.scene.clips import frame_count, list_clips, read_clip, read_track
from holdover_world.scene.layout import Track


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # [B, F, N, P]
    actions: Tensor  # [B, F, A]
    tracks: tuple[Track | None, ...] = ()  # per row its clip's layout, if there is one; empty: none has one
    starts: tuple[int, ...] = ()  # per row the video frame of its clip at which it starts

    def stand(self, history: WorldHistory, latent_frames: int) -> None:
        """Tell the history where each recording was after this many latent frames."""
        if self.tracks:
            history.stand(self.tracks, [start + latent_frames * FRAMES - 1 for start in self.starts])

    def without_layout(self) -> Batch:
        return replace(self, tracks=(), starts=())


def clips_of_length(folder: Path, latent_frames: int) -> list[Path]:
    """The clips of a folder.

    Raises:
        ValueError: there are none, or one is shorter than ``latent_frames``.
    """
    clips, needed = list_clips(folder), latent_frames * FRAMES
    if not clips:
        raise ValueError(f"{folder} holds no clips; record some with `holdover world record --out {folder}`")
    for clip in clips:
        if (length := frame_count(clip)) < needed:
            raise ValueError(f"{clip} has {length} frames, {needed} are needed: record a longer one, or remove it")
    return clips


class Segments:
    """Random segments of recorded clips, encoded once.

    Latents are kept in memory (a clip of 20 seconds takes 4 MB), and in ``.latents`` beside the clips for the next run
    with the same autoencoders. A clip that was recorded anew is encoded anew.
    """

    def __init__(self, clips: Sequence[Path], codec: Codec) -> None:
        kept = clips[0].parent / ".latents" / codec_digest(codec)
        kept.mkdir(parents=True, exist_ok=True)
        self.clips: list[Batch] = []
        self._folders = list(clips)
        for clip in track(clips, description="encoding clips"):
            file = kept / f"{clip.name}.safetensors"
            if not file.is_file() or file.stat().st_mtime_ns < (clip / "clip.json").stat().st_mtime_ns:
                partial = file.with_suffix(f".{os.getpid()}.partial")  # another run may be encoding the same clip
                try:
                    save_file(_encode(clip, codec), partial)
                    partial.replace(file)
                finally:
                    partial.unlink(missing_ok=True)
            kept_tensors = load_file(file)
            self.clips.append(Batch(kept_tensors["latents"], kept_tensors["actions"]))

    def sample(self, rng: np.random.Generator, batch: int, latent_frames: int) -> list[tuple[int, int]]:
        """Draw segments: for each a clip and its first latent frame."""
        chosen = []
        for clip in rng.integers(len(self.clips), size=batch):
            length = self.clips[clip].latents.shape[1]
            chosen.append((int(clip), int(rng.integers(length - latent_frames + 1))))
        return chosen

    def batch(self, chosen: list[tuple[int, int]], latent_frames: int, device: str | torch.device) -> Batch:
        """The tensors of segments."""

        def take(name: str) -> Tensor:
            parts: list[Any] = [getattr(self.clips[n], name)[:, first : first + latent_frames] for n, first in chosen]
            return torch.cat(parts).to(device).float()

        read = [read_track(self._folders[n]) for n, _ in chosen]
        tracks = tuple(track and track.to(device) for track in read)
        starts = tuple(first * FRAMES for _, first in chosen)
        return Batch(take("latents"), take("actions"), *((tracks, starts) if any(tracks) else ()))


def _encode(clip: Path, codec: Codec) -> dict[str, Tensor]:
    recording = read_clip(clip, depth="depth" in codec.sizes.modalities, cameras=[c.name for c in codec.sizes.cameras])
    whole = len(recording.actions) // FRAMES * FRAMES
    frames = {name: video[:whole] for name, video in recording.frames.items()}
    depth = {name: video[:whole] for name, video in recording.depth.items()} if recording.depth else None
    # Commands change only where latent frames begin.
    actions = torch.from_numpy(recording.actions[:whole]).unflatten(0, (-1, FRAMES)).mean(1)[None]
    latents = codec.encode(frames, depth, at_once=20).to("cpu", torch.bfloat16)
    return {"latents": latents.contiguous(), "actions": actions.contiguous()}


def codec_digest(codec: Codec) -> str:
    """Identifies latents: a digest of the encoders' weights, as saved, and of the layout of tokens."""
    found = hashlib.sha256(repr((codec.sizes.cameras, codec.sizes.patch, codec.sizes.depth_patch)).encode())
    for modality in codec.sizes.modalities:
        found.update(modality.encode())
        for name, tensor in sorted(codec.autoencoders[modality].state_dict().items()):
            if name.startswith(DECODING):
                continue
            found.update(name.encode() + tensor.cpu().bfloat16().float().numpy().tobytes())
    return found.hexdigest()[:16]

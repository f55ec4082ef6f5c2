"""Segments of recorded clips, as training takes them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdover.world.autoencoder import FRAMES
from holdover.world.clips import list_clips, read_clip
from holdover.world.latents import Codec


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # [B, F, N, P]
    actions: Tensor  # [B, F, A]


class Segments:
    """Random segments of recorded clips, encoded once.

    Latents are kept in memory (a clip of 20 seconds takes 4 MB) and, for the next run with the same autoencoders, in
    ``.latents`` beside the clips, unless these are recorded anew.
    """

    def __init__(self, folder: Path, codec: Codec) -> None:
        clips = list_clips(folder)
        if not clips:
            raise ValueError(f"{folder} holds no clips; record some with `holdover world record --out {folder}`")
        kept = folder / ".latents" / _digest(codec)
        kept.mkdir(parents=True, exist_ok=True)
        self.clips: list[Batch] = []
        for clip in track(clips, description="encoding clips"):
            file = kept / f"{clip.name}.safetensors"
            if not file.is_file() or file.stat().st_mtime_ns < (clip / "clip.json").stat().st_mtime_ns:
                partial = file.with_suffix(".partial")
                save_file(_encode(clip, codec), partial)
                partial.replace(file)
            self.clips.append(Batch(**load_file(file)))

    def sample(self, rng: np.random.Generator, batch: int, latent_frames: int) -> list[tuple[int, int]]:
        """Segments to take: a clip and its first latent frame, each.

        Raises:
            ValueError: a clip is too short.
        """
        chosen = []
        for clip in rng.integers(len(self.clips), size=batch):
            length = self.clips[clip].latents.shape[1]
            if length < latent_frames:
                raise ValueError(
                    f"a clip has {length} latent frames; training needs {latent_frames}: record longer ones"
                )
            chosen.append((int(clip), int(rng.integers(length - latent_frames + 1))))
        return chosen

    def batch(self, chosen: list[tuple[int, int]], latent_frames: int, device: str | torch.device) -> Batch:
        """Segments as the model takes them.

        Raises:
            ValueError: one reaches beyond the end of its clip.
        """
        for n, first in chosen:
            length, needed = self.clips[n].latents.shape[1], first + latent_frames
            if needed > length:
                raise ValueError(f"a clip has {length} latent frames; {needed} are needed: record longer ones")

        def take(name: str) -> Tensor:
            parts: list[Any] = [getattr(self.clips[n], name)[:, first : first + latent_frames] for n, first in chosen]
            return torch.cat(parts).to(device).float()

        return Batch(take("latents"), take("actions"))


def _encode(clip: Path, codec: Codec) -> dict[str, Tensor]:
    recording = read_clip(clip, depth="depth" in codec.sizes.modalities, cameras=[c.name for c in codec.sizes.cameras])
    whole = len(recording.actions) // FRAMES * FRAMES
    frames = {name: video[:whole] for name, video in recording.frames.items()}
    depth = {name: video[:whole] for name, video in recording.depth.items()} if recording.depth else None
    # Commands change where latent frames begin, so that none straddles two commands.
    actions = torch.from_numpy(recording.actions[:whole]).unflatten(0, (-1, FRAMES)).mean(1)[None]
    latents = codec.encode(frames, depth, at_once=20).to("cpu", torch.bfloat16)
    return {"latents": latents.contiguous(), "actions": actions.contiguous()}


def _digest(codec: Codec) -> str:
    """Of the autoencoders' weights and the layout."""
    found = hashlib.sha256(repr((codec.sizes.cameras, codec.sizes.patch, codec.sizes.depth_patch)).encode())
    for modality, autoencoder in sorted(codec.autoencoders.items()):
        found.update(modality.encode())
        for name, tensor in sorted(autoencoder.state_dict().items()):
            found.update(name.encode() + tensor.cpu().float().numpy().tobytes())
    return found.hexdigest()[:16]

"""Training the autoencoders of colour and of depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdover_world.codec.autoencoder import DECODING, Autoencoder
from holdover_world.codec.checkpoints import read_network, weights_digest, write_network
from holdover_world.config import FRAMES, SCALE
from holdover_world.runtime import fast_dtype
from holdover_world.scene.clips import frame_count, read_cameras, read_clip
from holdover_world.scene.depth import from_metres
from holdover_world.training.segments import clips_of_length
from holdover_world.training.trainer import Predict, Schedule, check_torch, fit

_HELDOUT = 12, 4  # latent frames of a held-out clip: where validation starts, and how many it takes

Pictures = Mapping[str, NDArray[Any]]  # per camera [T, H, W, C]: uint8 colour, or float16 depth in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class AutoencoderSchedule(Schedule):
    """How to train an autoencoder.

    Attributes:
        latent_frames: of a sample. The first is decoded without one before it.
        squared: weight of the squared error; the absolute error has weight 1.
        kl: weight of the latents' divergence from a unit Gaussian, per value.
    """

    steps: int = 1500
    batch: int = 3
    muon_weight_decay: float = 0.0
    decay: float = 0.9
    ema: float = 0.99
    latent_frames: int = 2
    squared: float = 4.0
    kl: float = 5e-4


def train_autoencoder(
    data: Path,
    out: Path,
    schedule: AutoencoderSchedule,
    *,
    heldout: Path | None = None,
    depth: bool = False,
    config: Mapping[str, Any] | None = None,
    start_from: Path | None = None,
    device: str = "cpu",
    save_every: int = 200,
) -> Path:
    """Train, or continue training, an autoencoder of colour or of depth; returns the folder of the averaged weights.

    Args:
        data: recorded clips. They are kept in memory (a clip of 20 seconds takes 25 MB, its depth 16 MB).
        heldout: clips to validate on.
        config: arguments of `Autoencoder`.
        start_from: a trained autoencoder, of which only the decoder is trained further. Its latents stay what they are,
            so a world model that was trained on them works with the new decoder. ``config`` may then hold
            ``decoder_blocks`` and nothing else, to make the decoder deeper.
        save_every: steps between two saves, each with a validation.

    Raises:
        ImportError: PyTorch is too old.
        ValueError: ``data`` or ``heldout`` holds no clips, a clip that is too short, or a camera whose size is not a
            multiple of 8 pixels; or ``out`` belongs to another run.
    """
    check_torch()
    torch.manual_seed(schedule.seed)
    begun = read_network(Autoencoder, start_from, torch.float32) if start_from else None
    if begun is not None and config is not None:
        if set(config) != {"decoder_blocks"}:
            raise ValueError(f"config={config} is for a new autoencoder; {start_from} has its own sizes")
        begun = begun.deepened(config["decoder_blocks"])
    new = Autoencoder(colours=1 if depth else 3, **(config or {})) if begun is None else begun.train()
    model = new.to(device)
    clips = clips_of_length(data, schedule.latent_frames)
    heldout_clips = clips_of_length(heldout, sum(_HELDOUT)) if heldout else []
    for folder in (data, heldout) if heldout else (data,):
        _check_cameras(folder)
    groups = _groups(data)
    kept: dict[Path, Pictures] = {}
    if begun is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(DECODING))
    else:
        model.take_principal_components(_some_blocks(clips, depth).to(device))
        model.mean_Z.fill_(torch.nan)  # marks what is saved before the end: `Codec.load` refuses it
        model.std_Z.fill_(torch.nan)
    frames = schedule.latent_frames * FRAMES

    def plan(_: int, rng: np.random.Generator) -> list[NDArray[Any]]:
        """For each group of cameras of one size a batch of videos, each from its own clip and moment."""
        batches = []
        for names in groups:
            videos = []
            for name in names * schedule.batch:
                clip = clips[rng.integers(len(clips))]
                if clip not in kept:
                    kept[clip] = _pictures(clip, depth)
                start = int(rng.integers(len(kept[clip][name]) - frames + 1))
                videos.append(kept[clip][name][start : start + frames])
            batches.append(np.stack(videos))
        return batches

    def loss(
        predict: Predict, batches: Sequence[NDArray[Any]], rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
        pixels = sum(batch.size for batch in batches)
        total, squares, divergence = torch.zeros((), device=device), 0.0, 0.0
        for batch in batches:
            video = as_video(batch).to(device)
            noise = torch.randn(_latents_of(video, model), generator=generator, device=device)
            made, mean, log_variance = predict(video, noise)
            difference, mean, log_variance = made.float() - video, mean.float(), log_variance.float()
            square = difference.square().mean()
            kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
            share = batch.size / pixels
            total = total + share * (difference.abs().mean() + schedule.squared * square + schedule.kl * kl)
            squares, divergence = squares + share * square.item(), divergence + share * kl.item()
        return total, {"psnr_db": round(10 * np.log10(4 / squares), 3), "kl": round(divergence, 3)}

    start, length = (FRAMES * latent_frames for latent_frames in _HELDOUT)
    held = [_pictures(clip, depth, start=start, frames=length) for clip in heldout_clips]

    def validate(predict: Predict) -> dict[str, Any]:
        squares = [
            (video.numel(), (_mean_reconstruction(predict, video, model).clamp(-1, 1) - video).square().mean().item())
            for pictures in held
            for video in (as_video(picture[None]).to(device) for picture in pictures.values())
        ]
        pixels = sum(n for n, _ in squares)
        return {"heldout_psnr_db": round(10 * np.log10(4 * pixels / sum(n * s for n, s in squares)), 3)} if held else {}

    def save(average: Mapping[str, Tensor]) -> None:
        shipped = Autoencoder.from_config(model.config)
        shipped.load_state_dict({**model.state_dict(), **average})
        write_network(shipped, out)

    identity = {name: value for name, value in model.config.items() if not name.startswith("_")}
    identity["start"] = weights_digest(start_from) if start_from else None
    fit(
        model,
        out,
        schedule,
        identity=identity,
        plan=plan,
        loss=loss,
        validate=validate,
        save=save,
        save_every=save_every,
    )
    if begun is None:
        shipped = read_network(Autoencoder, out, fast_dtype())
        normalise(shipped, [kept.get(clip) or _pictures(clip, depth) for clip in clips[:: max(1, len(clips) // 32)]])
        write_network(shipped, out)
    return out


@torch.no_grad()
def normalise(model: Autoencoder, clips: Sequence[Pictures]) -> None:
    """Set the mean and the deviation of each latent channel to those of some clips.

    A channel's variance is then in proportion to the deviation of its principal component, and one on average. So the
    channels that carry most of a picture emerge from noise first and weigh most in a loss.
    """
    values = []
    for video in (video for pictures in clips for video in pictures.values()):
        whole = as_video(video[None, : min(48, len(video) // FRAMES * FRAMES)]).to(model.dtype)
        values.append(model.posterior(whole)[0].float().transpose(0, 2).flatten(1))
    std, mean = torch.std_mean(torch.cat(values, 1), 1)
    weight = (model.deviation_Z / model.deviation_Z.mean()).float().sqrt()
    model.mean_Z.copy_(mean)
    model.std_Z.copy_(std.clamp(min=0.3) / weight)  # the least: an empty channel is not magnified


def _some_blocks(clips: Sequence[Path], depth: bool) -> Tensor:
    """Blocks of pixels from all recordings."""
    found = []
    for clip in clips[:: max(1, len(clips) // 24)]:
        total = frame_count(clip)
        for start in range(0, total - FRAMES + 1, max(FRAMES, total // 3)):
            pictures = _pictures(clip, depth, start=start, frames=FRAMES)
            found += [Autoencoder.blocks(as_video(video[None])) for video in pictures.values()]
    return torch.cat(found)


def as_video(pictures: NDArray[Any]) -> Tensor:
    """``[B, T, H, W, C]``, colours as uint8 or depth in [-1, 1], as ``float32 [B, T, C, H, W]`` in [-1, 1]."""
    video = torch.tensor(pictures).permute(0, 1, 4, 2, 3).float()
    return video / 127.5 - 1 if pictures.dtype == np.uint8 else video


def _mean_reconstruction(predict: Predict, video: Tensor, model: Autoencoder) -> Tensor:
    """A video decoded from the means of its latents."""
    made, _, _ = predict(video, torch.zeros(_latents_of(video, model), device=video.device))
    result: Tensor = made.float()
    return result


def _latents_of(video: Tensor, model: Autoencoder) -> tuple[int, ...]:
    """The shape of a video's latents."""
    b, t, _, height, width = video.shape
    return b, t // FRAMES, len(model.deviation_Z), height // SCALE, width // SCALE


def _check_cameras(folder: Path) -> None:
    for camera in read_cameras(folder):
        if camera.width % SCALE or camera.height % SCALE:
            raise ValueError(
                f"camera {camera.name} of {folder} is {camera.width}x{camera.height}; "
                f"record it in multiples of {SCALE} pixels"
            )


def _groups(folder: Path) -> list[list[str]]:
    """The names of the cameras of each size."""
    cameras = read_cameras(folder)
    sizes = list(dict.fromkeys((c.width, c.height) for c in cameras))
    return [[c.name for c in cameras if (c.width, c.height) == size] for size in sizes]


def _pictures(clip: Path, depth: bool, *, start: int = 0, frames: int | None = None) -> Pictures:
    recording = read_clip(clip, depth=depth, start=start, frames=frames)
    if not depth:
        return recording.frames
    assert recording.depth is not None
    values = {name: from_metres(torch.from_numpy(metres)) for name, metres in recording.depth.items()}
    return {name: video[..., None].numpy().astype(np.float16) for name, video in values.items()}

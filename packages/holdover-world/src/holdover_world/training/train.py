"""Training the world model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdover_world.codec.checkpoints import weights_digest
from holdover_world.codec.latents import Codec
from holdover_world.model.sampler import denoise, noise_levels
from holdover_world.model.transformer import WorldModel
from holdover_world.runtime import fast_dtype
from holdover_world.training.losses import distillation_loss, sequence_loss
from holdover_world.training.recipe import Recipe
from holdover_world.training.segments import Batch, Segments, clips_of_length, codec_digest
from holdover_world.training.trainer import Predict, check_torch, fit

_PLAIN = 4  # latent frames past the context, in a segment of the plain cadence
_HELDOUT_START = 12  # the latent frame of a held-out clip at which validation starts


@dataclass(frozen=True)
class _Plan:
    plain: bool
    own: bool
    frames: int
    segments: list[tuple[int, int]]


def train(
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    codec: Codec,
    heldout: Path | None = None,
    start_from: Path | None = None,
    teacher: Path | None = None,
    device: str = "cpu",
    save_every: int = 100,
) -> Path:
    """Train, or continue training, a world model; returns the folder of the averaged weights.

    Writes to ``out``: the model (for `WorldModel.load`), ``state.pt`` (to resume from) and ``log.jsonl`` (a line per
    step).

    Args:
        data: recorded clips.
        out: a folder for this run alone.
        codec: trained autoencoders, with the sizes of the model.
        heldout: clips for the learning curve.
        start_from: a checkpoint whose weights to begin with.
        teacher: a checkpoint to distil into fewer steps. The student begins with its weights, or with ``start_from``.
        save_every: steps between two saves, each with a point of the learning curve.

    Raises:
        ImportError: PyTorch is too old.
        ValueError: ``data`` or ``heldout`` holds no clips, or one that is too short; ``out`` belongs to another run;
            ``start_from`` or ``teacher`` has other sizes or autoencoders.
    """
    check_torch()
    torch.manual_seed(recipe.seed)
    model, sizes = WorldModel.of(codec.sizes), codec.sizes
    model.codec = codec
    rolls_out = teacher is not None or recipe.recorded
    if rolls_out and not recipe.levels:
        raise ValueError("levels=0: a student has few noise levels; give their number")
    if recipe.steady and teacher is None:
        raise ValueError(f"steady={recipe.steady}: a rollout that goes straight on was not recorded; give a teacher")
    teach = read_checkpoint(teacher, codec, device=device) if teacher else None
    begun = read_checkpoint(start_from, codec, device=device) if start_from else teach
    if begun is not None:
        model.load_state_dict(begun.state_dict())
    model.to(device)
    own_from = 0 if rolls_out else recipe.own_context_from * recipe.steps
    most = recipe.windows if own_from <= recipe.steps - 1 else 2  # windows past the context
    clips = clips_of_length(data, sizes.context + max(_PLAIN, sizes.window * most))
    heldout_clips = clips_of_length(heldout, _HELDOUT_START + sizes.context + sizes.window) if heldout else []
    segments, held = Segments(clips, codec), Segments(heldout_clips, codec) if heldout_clips else None

    def plan(step: int, rng: np.random.Generator) -> _Plan:
        plain = bool(rng.random() < recipe.plain_share) and not rolls_out
        own = step >= own_from
        windows = int(rng.integers(1, most + 1)) if own else 2
        frames = sizes.context + (_PLAIN if plain else sizes.window * windows)
        return _Plan(plain, own, frames, segments.sample(rng, recipe.batch, frames))

    def loss(predict: Predict, plan: _Plan, rng: np.random.Generator) -> tuple[Tensor, dict[str, Any]]:
        batch = segments.batch(plan.segments, plan.frames, device)
        if rng.random() < recipe.without_layout:
            batch = batch.without_layout()
        if rolls_out:
            return distillation_loss(predict, teach, model, batch, rng, recipe), {}
        value = sequence_loss(predict, model, batch, rng, recipe, plain=plan.plain, own=plan.own)
        return value, {"plain": plan.plain, "own": plan.own}

    def validate(predict: Predict) -> dict[str, Any]:
        return {"heldout": heldout_error(predict, model, held, recipe)} if held else {}

    def save(average: Mapping[str, Tensor]) -> None:
        twin = WorldModel.of(sizes)
        twin.load_state_dict({**model.state_dict(), **average})
        twin.codec = codec
        twin.save(out)

    identity = {
        **sizes.to_dict(),
        "cameras": [camera.name for camera in sizes.cameras],
        "autoencoders and cameras": codec_digest(codec),
        "teacher": weights_digest(teacher) if teacher else None,
        "start": weights_digest(start_from) if start_from else None,
    }
    fit(
        model,
        out,
        recipe,
        identity=identity,
        plan=plan,
        loss=loss,
        validate=validate,
        save=save,
        save_every=save_every,
    )
    return out


def read_checkpoint(folder: Path, codec: Codec, *, dtype: torch.dtype | None = None, device: str = "cpu") -> WorldModel:
    """Read a checkpoint that must have these sizes and autoencoders.

    Args:
        dtype: of the weights; by default `fast_dtype` of the device.

    Raises:
        ValueError: it has others.
    """
    found = WorldModel.load(folder, dtype=dtype or fast_dtype(device))
    if found.sizes != codec.sizes:
        raise ValueError(f"{folder} has {found.sizes}, not {codec.sizes}")
    if codec_digest(found.codec) != codec_digest(codec):
        raise ValueError(f"{folder} was trained with other autoencoders; use those in its own folder")
    there: WorldModel = found.to(device)
    return there


def heldout_error(predict: Predict, model: WorldModel, held: Segments, recipe: Recipe) -> list[float]:
    """Mean squared error of latents on held-out clips, for a window from pure noise: in one pass, and sampled."""
    sizes = model.sizes
    sigmas, device = noise_levels(recipe.levels or 4, recipe.shift), next(model.parameters()).device
    errors = []
    for index in range(0, len(held.clips), max(1, len(held.clips) // 6)):
        batch: Batch = held.batch([(index, _HELDOUT_START)], sizes.context + sizes.window, device)
        context, target = torch.split(batch.latents, [sizes.context, sizes.window], 1)
        actions = torch.split(batch.actions, [sizes.context, sizes.window], 1)
        history = model.new_history()
        predict(context, sigma=0.0, action_BFA=actions[0], history=history, write=True)
        batch.stand(history, sizes.context)
        generator = torch.Generator(device).manual_seed(index)
        results = []
        for levels in (sigmas[:1], sigmas):
            noise = torch.randn((len(levels), *target.shape), generator=generator, device=device)
            window = denoise(
                lambda i, x, s=levels, h=history, a=actions[1]: predict(x, sigma=s[i], action_BFA=a, history=h).float(),  # type: ignore[misc]
                noise,
                levels,
                target[:, :0],
            )
            results.append((window - target).square().mean())
        errors.append(torch.stack(results))
    return [round(x, 4) for x in torch.stack(errors).mean(0).tolist()]

"""Training the world model: flow matching on windows with context, then on contexts of the model's own making.

Every random choice is a function of (seed, step), so a run that was killed continues as if it had not been.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.func import functional_call

from holdover.world.clips import Clip
from holdover.world.config import WorldConfig
from holdover.world.kv_cache import KVCache
from holdover.world.sampler import denoise, noise_levels
from holdover.world.segments import Batch, Segments
from holdover.world.transformer import WorldModel

Predict = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the shipped checkpoint was trained.

    Attributes:
        steps: optimiser steps.
        batch: clips per step.
        own_context_from: share of the steps after which contexts, and half of the noisy inputs, are the model's own.
        plain_share: share of the steps that train the plain cadence (chunks of one latent frame).
        context_noise: largest noise level added to the clean context, so that small errors do not grow.
        l1: weight of an absolute error beside the squared one; it keeps edges sharper.
        muon_rate, adam_rate: peak learning rates of the linear layers' matrices (Muon) and of all else (AdamW).
        muon_weight_decay: of the matrices, against outlier channels.
        warmup, decay: steps of linear warm-up; share of the steps over which the rates fall to zero.
        ema: decay of the averaged weights that are saved.
        levels, shift: the sampler's noise levels, on which alone a few-step model is trained.
        seed: of data order, noise and initial weights.
    """

    steps: int = 1700
    batch: int = 2
    own_context_from: float = 0.82
    plain_share: float = 0.15
    context_noise: float = 0.15
    l1: float = 1.0
    muon_rate: float = 0.02
    adam_rate: float = 0.001
    muon_weight_decay: float = 0.1
    warmup: int = 50
    decay: float = 0.44
    ema: float = 0.995
    levels: int = 4
    shift: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps={self.steps} and batch={self.batch} must be at least 1")
        for name in ("own_context_from", "plain_share", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share of the steps, between 0 and 1")

    def rate(self, step: int) -> float:
        """The learning rate of a step as a share of its peak."""
        remaining = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, remaining)


def hold_actions(actions_BFA: Tensor, known: int) -> Tensor:
    """What a driver has commanded by the time frame ``known`` is drawn: later frames hold that action."""
    return torch.cat(
        [actions_BFA[:, : known + 1], actions_BFA[:, known:][:, :1].expand_as(actions_BFA[:, known + 1 :])], 1
    )


def error(prediction: Tensor, target: Tensor, sigma: float, recipe: Recipe) -> Tensor:
    """Flow matching's velocity error of a clean prediction, and an absolute error beside it."""
    difference = (prediction.float() - target) / sigma
    return difference.square().mean() + recipe.l1 * difference.abs().mean()


def sequence_loss(
    predict: Predict,
    model: WorldModel,
    batch: Batch,
    rng: np.random.Generator,
    recipe: Recipe,
    *,
    plain: bool,
    own: bool,
) -> Tensor:
    """The loss of one segment: chunk by chunk, context written by clean passes, one noisy pass on every target.

    Args:
        plain: chunks of one latent frame (and every chunk past the context is a target), else of a window.
        own: replace the contexts, and half of the noisy inputs, by what the model makes itself; the last chunk is
            then the only target.
    """
    config, sigmas = model.config, noise_levels(recipe.levels, recipe.shift)
    chunk = 1 if plain else config.window
    chunks = batch.latents.shape[1] // chunk
    first_target = config.context // chunk
    generator = torch.Generator(batch.latents.device).manual_seed(int(rng.integers(2**62)))

    def noise_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, device=x.device)

    kv, losses = model.new_cache(), []
    for i in range(chunks):
        latents = batch.latents[:, i * chunk : (i + 1) * chunk]
        actions = batch.actions[:, i * chunk : (i + 1) * chunk]
        held = hold_actions(actions, int(rng.integers(chunk)))
        if i >= first_target and (not own or i == chunks - 1):
            level = int(rng.integers(len(sigmas)))
            clean = latents
            if own and level and rng.random() < 0.5:
                known = latents[:, : int(rng.integers(chunk))]
                clean = _generate(predict, known, noise_like, latents, held, kv, sigmas[:level])
            sigma = sigmas[level]
            noisy = (1 - sigma) * clean + sigma * noise_like(latents)
            losses.append(error(predict(noisy, sigma=sigma, action_BFA=held, cache=kv), latents, sigma, recipe))
        if i == chunks - 1:
            break
        context = latents
        if own and i >= first_target:
            context = _generate(predict, latents[:, :0], noise_like, latents, actions, kv, sigmas)
        context = context + recipe.context_noise * rng.random() ** 2 * noise_like(context)
        shown = held if rng.random() < 0.5 else actions
        # The oldest context stays out of the backward pass, unless it is the only one: a sixth of a step saved.
        with torch.set_grad_enabled(i >= first_target or i == chunks - 2):
            predict(context, sigma=0.0, action_BFA=shown, cache=kv, write=True)
    return torch.stack(losses).mean()


@torch.no_grad()
def _generate(
    predict: Predict,
    known: Tensor,
    noise_like: Callable[[Tensor], Tensor],
    latents: Tensor,
    actions: Tensor,
    kv: KVCache,
    sigmas: tuple[float, ...],
) -> Tensor:
    noise = torch.stack([noise_like(latents) for _ in sigmas])
    return denoise(lambda i, x: predict(x, sigma=sigmas[i], action_BFA=actions, cache=kv).float(), noise, sigmas, known)


def train(
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    heldout: Path | None = None,
    start_from: Path | None = None,
    config: WorldConfig | None = None,
    device: str = "cpu",
    save_every: int = 100,
) -> Path:
    """Train, or continue training, a world model; returns the path of the averaged weights.

    ``out`` receives ``model.safetensors`` (averaged, for `WorldModel.load`), ``state.pt`` (to resume) and
    ``log.jsonl`` (a line a step).

    Args:
        data: recorded clips.
        out: a folder of this run's own.
        heldout: clips for the learning curve.
        start_from: a checkpoint whose weights and sizes to begin with, in place of random weights and ``config``.
        config: sizes; by default those of the shipped checkpoint.
        device: where to train.
        save_every: steps from one save, and one point of the learning curve, to the next.

    Raises:
        ValueError: ``data`` holds no clips, ``out`` belongs to another recipe, or ``start_from`` comes with ``config``.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(f"training needs torch.optim.Muon (torch 2.9 or newer), not torch {torch.__version__}")
    if start_from is not None and config is not None:
        raise ValueError(f"start_from={start_from} brings its own sizes; leave out config")
    torch.manual_seed(recipe.seed)
    if start_from is not None:
        model = WorldModel.load(start_from, dtype=torch.float32).requires_grad_(True).train().to(device)
    else:
        model = WorldModel(config or WorldConfig()).to(device)
    config = model.config
    parameters = dict(model.named_parameters())
    average = {name: p.detach().clone() for name, p in parameters.items()}
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    others = [p for p in parameters.values() if not any(p is m for m in matrices)]
    optimisers: list[tuple[torch.optim.Optimizer, float]] = [  # each with its peak rate
        (torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.muon_weight_decay), recipe.muon_rate),
        (torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0), recipe.adam_rate),
    ]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.jsonl"
    saved = Saved(out, recipe, model, average, [optimiser for optimiser, _ in optimisers])
    first = saved.resume()
    segments, held = Segments(data, config), Segments(heldout, config) if heldout else None

    def plan(step: int) -> tuple[np.random.Generator, bool, bool, list[Clip]]:
        rng = np.random.default_rng([recipe.seed, step])
        plain, own = bool(rng.random() < recipe.plain_share), step >= recipe.own_context_from * recipe.steps
        if plain:
            frames = config.context + 4
        else:
            frames = config.context + config.window * (int(rng.integers(1, 5)) if own else 2)
        return rng, plain, own, segments.sample(rng, recipe.batch, frames)

    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn()
    with log.open("a") as lines, ThreadPoolExecutor(1) as loader, Progress(*columns) as progress:
        bar = progress.add_task("training", total=recipe.steps, completed=first)
        upcoming = loader.submit(plan, first) if first < recipe.steps else None
        for step in range(first, recipe.steps):
            assert upcoming is not None
            started = perf_counter()
            rng, plain, own, clips = upcoming.result()
            # The loader keeps off PyTorch: a second thread's OpenMP team would make this one's sleep between
            # operations, which took a third of a step.
            upcoming = loader.submit(plan, step + 1)
            batch = segments.batch(clips, device)
            half = {name: p.bfloat16() for name, p in parameters.items()}

            def predict(*args: Any, _half: dict[str, Tensor] = half, **kwargs: Any) -> Tensor:
                result: Tensor = functional_call(model, _half, args, kwargs)
                return result

            loss = sequence_loss(predict, model, batch, rng, recipe, plain=plain, own=own)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            for optimiser, peak in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = peak * recipe.rate(step)
                optimiser.step()
                optimiser.zero_grad()
            blend = 1 - min(recipe.ema, (step + 1) / (step + 10))
            for name, p in parameters.items():
                average[name].lerp_(p.detach(), blend)
            record: dict[str, Any] = {
                "step": step,
                "loss": loss.item(),
                "norm": norm.item(),
                "plain": plain,
                "own": own,
            }
            record["seconds"] = round(perf_counter() - started, 3)
            finished = step + 1 == recipe.steps
            if finished or (step + 1) % save_every == 0:
                if held:
                    record["heldout_psnr_db"] = heldout_psnr(model, average, held, recipe)
                saved.save(step + 1)
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            progress.update(bar, advance=1, description=f"training, loss {record['loss']:.4f}")
    return out / "model.safetensors"


@torch.no_grad()
def heldout_psnr(model: WorldModel, average: dict[str, Tensor], held: Segments, recipe: Recipe) -> list[float]:
    """PSNR in dB of the averaged weights on held-out clips: a window from pure noise in one pass, then sampled."""
    config, sigmas = model.config, noise_levels(recipe.levels, recipe.shift)
    half = {name: p.bfloat16() for name, p in average.items()}
    device = next(model.parameters()).device

    def predict(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = functional_call(model, half, args, kwargs)
        return result

    errors = []
    for index, clip in enumerate(held.clips[:: max(1, len(held.clips) // 6)][:6]):
        batch = held.batch([held.read(clip, 48, config.context + config.window)], device)
        context, target = torch.split(batch.latents, [config.context, config.window], 1)
        actions = torch.split(batch.actions, [config.context, config.window], 1)
        kv = model.new_cache()
        predict(context, sigma=0.0, action_BFA=actions[0], cache=kv, write=True)
        generator = torch.Generator(device).manual_seed(index)
        results = []
        for levels in (sigmas[:1], sigmas):
            noise = torch.randn((len(levels), *target.shape), generator=generator, device=device)
            window = denoise(
                lambda i, x, s=levels, k=kv, a=actions[1]: predict(x, sigma=s[i], action_BFA=a, cache=k).float(),  # type: ignore[misc]
                noise,
                levels,
                target[:, :0],
            )
            results.append((window.clamp(-1, 1) - target).square().mean())
        errors.append(torch.stack(results))
    return [round(x, 3) for x in (10 * torch.log10(4 / torch.stack(errors).mean(0))).tolist()]


@dataclass(frozen=True)
class Saved:
    """What a run needs to go on, and the folder it lies in."""

    out: Path
    recipe: Recipe
    model: WorldModel
    average: dict[str, Tensor]
    optimisers: list[torch.optim.Optimizer]

    def save(self, step: int) -> None:
        state = {
            "step": step,
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        partial = self.out / "state.partial"
        torch.save(state, partial)
        partial.replace(self.out / "state.pt")
        twin = WorldModel(self.model.config)
        twin.load_state_dict(self.average)
        twin.save(self.out / "model.safetensors")

    def resume(self) -> int:
        """Take up the last saved state, cut the log back to it, and return the step to go on from."""
        log, saved = self.out / "log.jsonl", self.out / "state.pt"
        if not saved.is_file():
            log.unlink(missing_ok=True)
            return 0
        state = torch.load(saved, map_location="cpu", weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{self.out} was trained with {state['recipe']}; use that recipe or another folder")
        self.model.load_state_dict(state["model"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        for optimiser, saved_state in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved_state)
        step: int = state["step"]
        lines = log.read_text().splitlines(keepends=True)
        partial = log.with_suffix(".partial")
        partial.write_text("".join(lines[:step]))
        partial.replace(log)
        return step


def read_log(out: Path) -> Iterator[dict[str, Any]]:
    """The lines of a training log, one dictionary a step."""
    for line in (out / "log.jsonl").read_text().splitlines():
        yield json.loads(line)

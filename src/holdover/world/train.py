"""Training the world model, resumable.

Every random choice is a function of (seed, step), so a run that was killed continues as if it had not been.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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

from holdover.world.adversary import Discriminator, discriminator_loss
from holdover.world.clips import Clip
from holdover.world.config import WorldConfig
from holdover.world.losses import rollout_loss, sequence_loss
from holdover.world.recipe import Recipe
from holdover.world.sampler import denoise, noise_levels
from holdover.world.segments import Segments
from holdover.world.transformer import WorldModel


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
    judge = Discriminator(config).to(device) if recipe.adversary else None
    if judge:
        optimisers.append(
            (torch.optim.AdamW(judge.parameters(), lr=recipe.judge_rate, betas=(0.0, 0.9)), recipe.judge_rate)
        )
    saved = Saved(out, recipe, model, judge, average, [optimiser for optimiser, _ in optimisers])
    first = saved.resume()
    segments, held = Segments(data, config), Segments(heldout, config) if heldout else None

    def plan(step: int) -> tuple[np.random.Generator, bool, bool, list[Clip]]:
        rng = np.random.default_rng([recipe.seed, step])
        plain, own = bool(rng.random() < recipe.plain_share), step >= recipe.own_context_from * recipe.steps
        if plain:
            frames = config.context + 4
        elif recipe.adversary:
            frames = config.context + config.window * int(rng.integers(1, recipe.rollout + 1))
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

            record: dict[str, Any] = {"step": step, "plain": plain, "own": own}
            if judge:
                weight = recipe.adversary * min(1.0, step / recipe.warmup)  # it is a judge once it has learned
                surrogate, loss, generated = rollout_loss(
                    predict, model, batch, rng, recipe, judge, plain=plain, weight=weight
                )
                surrogate.backward()
                recorded, made = batch.latents[:, config.context :], generated
                if not plain:  # one window is enough
                    window = int(rng.integers(generated.shape[1] // config.window))
                    recorded, made = (x.split(config.window, 1)[window] for x in (recorded, generated))
                judgement = discriminator_loss(judge(recorded), judge(made))
                judgement.backward()
                record["judgement"] = judgement.item()
            else:
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
            record |= {"loss": loss.item(), "norm": norm.item(), "seconds": round(perf_counter() - started, 3)}
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
    judge: Discriminator | None
    average: dict[str, Tensor]
    optimisers: list[torch.optim.Optimizer]

    def save(self, step: int) -> None:
        state = {
            "step": step,
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "judge": self.judge.state_dict() if self.judge else None,
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
        if self.judge:
            self.judge.load_state_dict(state["judge"])
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

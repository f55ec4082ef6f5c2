"""The training loop of every network here: resumable, with averaged weights, on one device.

Every random choice is a function of the seed and the step, so a run that was killed continues as if it had not been.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from holdover_world.runtime import fast_dtype

Sample = TypeVar("Sample")
Predict = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The numbers of a run that do not depend on the loss.

    Attributes:
        steps: optimiser steps.
        batch: samples per step.
        muon_rate, adam_rate: peak learning rates, of the matrices of linear layers (Muon) and of all else (AdamW).
        muon_weight_decay: of the matrices. It keeps single channels from growing far beyond the others.
        warmup: steps of linear warm-up.
        decay: the share of the steps, at the end, over which the rates fall to zero.
        ema: decay of the averaged weights, which are the ones that are saved.
        seed: of data order, noise and initial weights.
    """

    steps: int
    batch: int
    muon_rate: float = 0.02
    adam_rate: float = 0.001
    muon_weight_decay: float = 0.1
    warmup: int = 50
    decay: float = 0.5
    ema: float = 0.995
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay} is a share of the steps; give a number between 0 and 1")

    def rate(self, step: int) -> float:
        """The learning rate of a step as a share of its peak."""
        remaining = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, remaining)


def check_torch() -> None:
    """Check that this PyTorch can train. Call it before anything slow.

    Raises:
        ImportError: it cannot.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"torch {torch.__version__} has no torch.optim.Muon: pip install 'torch>=2.9' to train")


def fit(
    model: nn.Module,
    out: Path,
    schedule: Schedule,
    *,
    identity: Mapping[str, Any],
    plan: Callable[[int, np.random.Generator], Sample],
    loss: Callable[[Predict, Sample, np.random.Generator], tuple[Tensor, dict[str, Any]]],
    save: Callable[[Mapping[str, Tensor]], None],
    validate: Callable[[Predict], dict[str, Any]] | None = None,
    save_every: int = 100,
) -> None:
    """Train, or continue training. Writes ``state.pt``, to resume from, and ``log.jsonl``, a line per step, to ``out``.

    Args:
        identity: plain values that, with the schedule, identify this run.
        plan: draws the sample of a step. It runs on another thread while the step before is computed, and must not use
            PyTorch: the OpenMP threads of two PyTorch threads slow each other down.
        loss: the loss of a sample, and values to log. Its ``predict`` calls the model with its weights in `fast_dtype`.
        save: writes averaged weights for use.
        validate: measures averaged weights; the result is logged.
        save_every: steps between two saves, each with a validation.

    Raises:
        ValueError: ``out`` belongs to a run with another schedule or identity.
    """
    parameters = dict(model.named_parameters())
    average = {name: p.detach().clone() for name, p in parameters.items()}
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    others = [p for p in parameters.values() if not any(p is m for m in matrices)]
    optimisers: list[tuple[torch.optim.Optimizer, float]] = [  # each with its peak rate
        (torch.optim.Muon(matrices, lr=0.0, weight_decay=schedule.muon_weight_decay), schedule.muon_rate),
        (torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0), schedule.adam_rate),
    ]
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(out, {**asdict(schedule), **identity}, model, average, [optimiser for optimiser, _ in optimisers])
    first = run.resume()

    def draw(step: int) -> tuple[np.random.Generator, Sample]:
        rng = np.random.default_rng([schedule.seed, step])
        return rng, plan(step, rng)

    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn()
    with run.log.open("a") as lines, ThreadPoolExecutor(1) as loader, Progress(*columns) as progress:
        bar = progress.add_task("training", total=schedule.steps, completed=first)
        upcoming = loader.submit(draw, first)
        for step in range(first, schedule.steps):
            started = perf_counter()
            rng, sample = upcoming.result()
            if step + 1 < schedule.steps:
                upcoming = loader.submit(draw, step + 1)
            value, record = loss(_in_fast(model, parameters), sample, rng)
            value.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            for optimiser, peak in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = peak * schedule.rate(step)
                with muon_precision(next(iter(parameters.values())).device):
                    optimiser.step()
                optimiser.zero_grad()
            blend = 1 - min(schedule.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], blend)
            record = {"step": step, "loss": value.item(), "norm": norm.item(), **record}
            record["seconds"] = round(perf_counter() - started, 3)
            progress.update(bar, advance=1, description=f"training, loss {record['loss']:.4f}")
            due = step + 1 == schedule.steps or (step + 1) % save_every == 0
            if due and validate:
                with torch.no_grad():
                    record |= validate(_in_fast(model, average))
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            if due:
                save(average)
                run.save(step + 1)  # last, so that a run killed in between repeats the steps since the last save


def muon_precision(device: torch.device) -> AbstractContextManager[object]:
    """Make `torch.optim.Muon` orthogonalise in `fast_dtype`; by itself it does so in bfloat16."""
    return nullcontext() if fast_dtype(device) == torch.bfloat16 else _Float32()


class _Float32(TorchFunctionMode):
    """Turns ``tensor.bfloat16()`` into a copy in float32. A copy, because the caller may change it in place."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


def _in_fast(model: nn.Module, weights: Mapping[str, Tensor]) -> Predict:
    """Calls of the model with these weights in `fast_dtype`."""
    fast = {name: w.to(fast_dtype(w.device)) for name, w in weights.items()}

    def predict(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, fast, args, kwargs)

    return predict


@dataclass(frozen=True)
class _Run:
    """The state of a run, and its folder."""

    out: Path
    identity: dict[str, Any]
    model: nn.Module
    average: dict[str, Tensor]
    optimisers: list[torch.optim.Optimizer]

    @property
    def log(self) -> Path:
        return self.out / "log.jsonl"

    def save(self, step: int) -> None:
        state = {
            "step": step,
            "identity": self.identity,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        partial = self.out / "state.partial"
        torch.save(state, partial)
        partial.replace(self.out / "state.pt")

    def resume(self) -> int:
        """Load the last saved state, cut the log back to it, and return the step to continue from."""
        saved = self.out / "state.pt"
        if not saved.is_file():
            self.log.unlink(missing_ok=True)
            return 0
        state = torch.load(saved, map_location="cpu", weights_only=True)
        known, own = state["identity"], self.identity
        if known != own:
            other = [f"{k}={known.get(k)}, not {own.get(k)}" for k in {**known, **own} if known.get(k) != own.get(k)]
            raise ValueError(f"{self.out} was trained with {'; '.join(other)}: use the same, or another folder")
        self.model.load_state_dict(state["model"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        for optimiser, saved_state in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved_state)
        step: int = state["step"]
        lines = self.log.read_text().splitlines(keepends=True)
        partial = self.log.with_suffix(".partial")
        partial.write_text("".join(lines[:step]))
        partial.replace(self.log)
        return step


def read_log(out: Path) -> Iterator[dict[str, Any]]:
    """The lines of a training log, one dictionary per step."""
    for line in (out / "log.jsonl").read_text().splitlines():
        yield json.loads(line)

"""The loop that every network here is trained by: resumable, averaged, on one device or one per rank.

Every random choice is a function of (seed, step, rank), so a run that was killed continues as if it had not been.
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
import torch.distributed as dist
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from holdover_world.runtime import fast_dtype

Sample = TypeVar("Sample")
Predict = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How weights move, whatever the loss.

    Attributes:
        steps: optimiser steps.
        batch: samples per step (and rank).
        muon_rate, adam_rate: peak learning rates of the linear layers' matrices (Muon) and of all else (AdamW).
        muon_weight_decay: of the matrices, against outlier channels.
        warmup, decay: steps of linear warm-up; share of the steps over which the rates fall to zero.
        ema: decay of the averaged weights that are saved.
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
            raise ValueError(f"decay={self.decay} is a share of the steps, between 0 and 1")

    def rate(self, step: int) -> float:
        """The learning rate of a step as a share of its peak."""
        remaining = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, remaining)


def check_torch() -> None:
    """To be called before anything slow.

    Raises:
        ImportError: this PyTorch cannot train.
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
    """Train, or continue training; ``out`` receives ``state.pt`` (to resume) and ``log.jsonl`` (a line a step).

    Under an initialised ``torch.distributed`` every rank draws samples of its own, gradients are averaged, and rank 0
    alone writes; none returns before it has.

    Args:
        identity: what else, beside the schedule, makes this run what it is, in plain values.
        plan: draws the sample of a step; runs on another thread while the step before is computed, and keeps off
            PyTorch: a second thread's OpenMP team would make this one's sleep between operations.
        loss: of a sample, by a ``predict`` that calls the model with its weights in `fast_dtype`; and what to log.
        save: writes averaged weights for use.
        validate: measures averaged weights; what it returns is logged.
        save_every: steps from one save and validation to the next.

    Raises:
        ValueError: ``out`` belongs to a run with another schedule or identity.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
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
    first = run.resume(cut_log=rank == 0)

    def draw(step: int) -> tuple[np.random.Generator, Sample]:
        rng = np.random.default_rng([schedule.seed, step, rank])
        return rng, plan(step, rng)

    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn()
    with run.log.open("a") as lines, ThreadPoolExecutor(1) as loader, Progress(*columns, disable=rank > 0) as progress:
        bar = progress.add_task("training", total=schedule.steps, completed=first)
        upcoming = loader.submit(draw, first)
        for step in range(first, schedule.steps):
            started = perf_counter()
            rng, sample = upcoming.result()
            if step + 1 < schedule.steps:
                upcoming = loader.submit(draw, step + 1)
            value, record = loss(_in_fast(model, parameters), sample, rng)
            value.backward()
            if ranks > 1:
                for p in parameters.values():
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # another rank's loss may have used it
                    dist.all_reduce(p.grad.div_(ranks))
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
            if rank > 0:
                continue
            due = step + 1 == schedule.steps or (step + 1) % save_every == 0
            if due and validate:
                with torch.no_grad():
                    record |= validate(_in_fast(model, average))
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            if due:
                save(average)
                run.save(step + 1)  # last: a run that is killed before goes back to where all of it is done again
    wait_for_all()


def muon_precision(device: torch.device) -> AbstractContextManager[object]:
    """`torch.optim.Muon` orthogonalises in bfloat16; within this context it does so in `fast_dtype`."""
    return nullcontext() if fast_dtype(device) == torch.bfloat16 else _Float32()


class _Float32(TorchFunctionMode):
    """Turns ``tensor.bfloat16()`` into a copy in float32; a copy, because what follows may work in place."""

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


def wait_for_all() -> None:
    """Where there are several ranks: until each is here."""
    if dist.is_initialized():
        dist.barrier()


def _in_fast(model: nn.Module, weights: Mapping[str, Tensor]) -> Predict:
    fast = {name: w.to(fast_dtype(w.device)) for name, w in weights.items()}

    def predict(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, fast, args, kwargs)

    return predict


@dataclass(frozen=True)
class _Run:
    """What a run needs to go on, and the folder it lies in."""

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

    def resume(self, *, cut_log: bool) -> int:
        """Take up the last saved state, cut the log back to it if asked, and return the step to go on from."""
        saved = self.out / "state.pt"
        if not saved.is_file():
            if cut_log:
                self.log.unlink(missing_ok=True)
            return 0
        state = torch.load(saved, map_location="cpu", weights_only=True)
        known, own = state["identity"], self.identity
        if known != own:
            other = [f"{k}={known.get(k)}, not {own.get(k)}" for k in {**known, **own} if known.get(k) != own.get(k)]
            raise ValueError(f"{self.out} was trained with {'; '.join(other)}: go on so, or use another folder")
        self.model.load_state_dict(state["model"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        for optimiser, saved_state in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved_state)
        step: int = state["step"]
        if not cut_log:
            return step
        lines = self.log.read_text().splitlines(keepends=True)
        partial = self.log.with_suffix(".partial")
        partial.write_text("".join(lines[:step]))
        partial.replace(self.log)
        return step


def read_log(out: Path) -> Iterator[dict[str, Any]]:
    """The lines of a training log, one dictionary a step."""
    for line in (out / "log.jsonl").read_text().splitlines():
        yield json.loads(line)

"""A tiny seeded world model with a KV cache, and the window cadence of docs/methods.md around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdover import Slot, ViewGroup
from holdover.slot import Kind

GROUPS = (ViewGroup("front", 1, 4, 6), ViewGroup("side", 2, 3, 4))
PER_FRAME = sum(group.tokens for group in GROUPS)
WINDOW, DIM, CHANNELS, BLOCKS = 4, 32, 6, 4
#: What the blocks' attention is declared to be.
KINDS: tuple[Kind, ...] = ("spatial", "temporal", "cross", "spatial")
#: Of a few-step and of a multi-step sampler.
FEW = (1.0, 0.9375, 0.8333, 0.625)
MANY = tuple(1 - n / 24 for n in range(24))

Runner = Callable[[dict[str, Any], Callable[..., Tensor]], Tensor]
KV = dict[int, tuple[Tensor, Tensor]]


class ToyAttention(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(
        self, x: Tensor, kv: KV | None = None, write: bool = False, at: Tensor | None = None, kept: Any = None
    ) -> Tensor:
        """``kept`` takes keys and values; given ``at``, x is these tokens alone, and it has those of the others."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, DIM // 2).permute(2, 0, 3, 1, 4)
        if at is not None:
            k, v = kept["k"].index_copy_(2, at, k), kept["v"].index_copy_(2, at, v)
        own = k, v
        if kept is not None:
            kept |= {"k": k, "v": v}
        if kv is not None and self.index in kv:
            k, v = torch.cat([kv[self.index][0], k], 2), torch.cat([kv[self.index][1], v], 2)
        if kv is not None and write:
            kv[self.index] = own
        attended: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended


class ToyBlock(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.attention = ToyAttention(index)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(
        self, hidden_states: Tensor, modulation: Tensor, kv: KV | None = None, write: bool = False, **part: Any
    ) -> Tensor:
        y = hidden_states + self.attention(self.modulated(hidden_states, modulation), kv, write=write, **part)
        return y + self.mlp(F.layer_norm(y, (DIM,)))

    def modulated(self, hidden_states: Tensor, modulation: Tensor, *_: Any, **__: Any) -> Tensor:
        return F.layer_norm(hidden_states, (DIM,)) * (1 + modulation[:, None])


def compute_part(
    run: Callable[..., Any], tokens: Tensor | None, memory: Mapping[str, Tensor], args: Any, kwargs: dict[str, Any]
) -> tuple[Any, Mapping[str, Tensor]]:
    """A block for some of its tokens, given the keys and values of the others."""
    kept = dict(memory)
    return run(*args, **kwargs, at=tokens, kept=kept), kept


@dataclass
class Compute:
    """One block of one pass, as the twins see it."""

    block: ToyBlock
    modulation: Tensor
    kv: KV | None
    write: bool

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x, self.modulation, self.kv, write=self.write)
        return y

    def modulated(self, x: Tensor) -> Tensor:
        return self.block.modulated(x, self.modulation)

    def attention(self, x: Tensor) -> Tensor:
        attended: Tensor = self.block.attention(x, self.kv, write=self.write)
        return attended

    def mlp(self, x: Tensor) -> Tensor:
        y: Tensor = self.block.mlp(x)
        return y


class ToyModel(nn.Module):
    """Predicts the clean window ``[B, F·PER_FRAME, CHANNELS]``; frames see themselves and the KV cache."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Linear(CHANNELS, DIM)
            self.position = nn.Parameter(torch.randn(PER_FRAME, DIM))
            self.modulate = nn.Linear(4, DIM)
            self.blocks = nn.ModuleList(ToyBlock(index) for index in range(BLOCKS))
            self.head = nn.Linear(DIM, CHANNELS)
        self.eval().requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        *,
        sigma: float,
        action: Tensor,
        condition: float = 0.0,
        kv: KV | None = None,
        write: bool = False,
        apply: Callable[[int, Tensor, Compute], Tensor] | None = None,
    ) -> Tensor:
        """``apply(block, x, compute)``, if given, stands between the model and its blocks: the twins' way in."""
        steer = torch.tensor([[sigma, condition]], dtype=x.dtype).expand(len(x), -1)
        modulation = self.modulate(torch.cat([action.expand(len(x), -1).to(x.dtype), steer], 1))
        h = self.embed(x) + self.position.repeat(x.shape[1] // PER_FRAME, 1) + modulation[:, None]
        for index, block in enumerate(self.blocks):
            if apply is None:
                h = block(h, modulation, kv, write=write)
            else:
                h = apply(index, h, Compute(block, modulation, kv, write))
        return torch.tanh(self.head(h))

    def holdover_slots(self) -> list[Slot]:
        slots = [Slot("", kind="model", prediction="clean")]
        taps = {"modulated": ToyBlock.modulated}
        slots += [Slot(f"blocks.{index}", taps=taps, part=compute_part) for index in range(BLOCKS)]
        for index, kind in enumerate(KINDS):
            slots += [Slot(f"blocks.{index}.attention", kind=kind), Slot(f"blocks.{index}.mlp", kind="mlp")]
        return slots

    def holdover_view_groups(self) -> tuple[ViewGroup, ...]:
        return GROUPS


@dataclass
class ToyLoop:
    """One stream: cycles of WINDOW chunks with one noise, the first of them committed at the end of the cycle.

    ``fields`` of every pass go to the runner together with the pass itself.
    """

    seed: int = 0
    stream: str = "default"
    branches: tuple[str, ...] = ("",)
    sigmas: tuple[float, ...] = FEW
    chunk: int = 0
    emitted: list[Tensor] = field(default_factory=list)
    noise: Tensor | None = None
    committed: Tensor | None = None
    committed_action: Tensor | None = None
    kv: dict[str, KV] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, model: ToyModel, action: tuple[float, float], runner: Runner, condition: float = 0.0) -> Tensor:
        """Generate one piece ``[1, PER_FRAME, CHANNELS]``."""
        position = self.chunk % WINDOW
        if position == 0:
            source = torch.Generator().manual_seed(1000 * self.seed + self.chunk)
            draws = len(self.sigmas) if len(self.sigmas) == len(FEW) else 1  # many steps follow one noise to its end
            self.noise = torch.randn(draws, 1, WINDOW * PER_FRAME, CHANNELS, generator=source)
            self.emitted = []
        assert self.noise is not None
        command = torch.tensor([action])
        known = torch.cat([self.noise[0, :, :0], *self.emitted], 1)
        clean = torch.zeros_like(self.noise[0])
        for index, sigma in enumerate(self.sigmas):
            clean[:, : known.shape[1]] = known
            noisy = (1 - sigma) * clean + sigma * self.noise[min(index, len(self.noise) - 1)]
            clean = self._denoise(model, runner, self.chunk, index, noisy, action, condition)
        if position == 0:
            self.committed, self.committed_action = clean.clone(), command
        self.emitted.append(clean[:, position * PER_FRAME : (position + 1) * PER_FRAME].clone())
        if position == WINDOW - 1:
            assert self.committed is not None
            assert self.committed_action is not None
            self._commit(model, runner, self.chunk, self.committed, self.committed_action, condition)
        self.chunk += 1
        return self.emitted[-1]

    def _denoise(
        self,
        model: ToyModel,
        runner: Runner,
        chunk: int,
        index: int,
        noisy: Tensor,
        action: tuple[float, float],
        condition: float,
    ) -> Tensor:
        """One step, all branches: the clean latents."""
        sigma, outputs = self.sigmas[index], []
        for n, branch in enumerate(self.branches):
            fields = {
                "stream": self.stream,
                "branch": branch,
                "chunk": chunk,
                "index": index,
                "num_steps": len(self.sigmas),
                "sigma": sigma,
                "action": action,
                "condition": condition,
                "commits": chunk % WINDOW == 0,
            }
            outputs.append(self._run(model, runner, fields, noisy, n, sigma, torch.tensor([action]), condition))
        return outputs[0] if len(outputs) == 1 else outputs[1] + 1.5 * (outputs[0] - outputs[1])

    def _commit(
        self, model: ToyModel, runner: Runner, chunk: int, clean: Tensor, action: Tensor, condition: float
    ) -> None:
        for n, branch in enumerate(self.branches):
            fields = {"stream": self.stream, "branch": branch, "chunk": chunk, "role": "kv_update"}
            self._run(model, runner, fields, clean, n, 0.0, action, condition, write=True)

    def _run(
        self,
        model: ToyModel,
        runner: Runner,
        fields: dict[str, Any],
        x: Tensor,
        branch: int,
        sigma: float,
        action: Tensor,
        condition: float,
        write: bool = False,
    ) -> Tensor:
        kv = self.kv.setdefault(self.branches[branch], {})
        arguments = {"sigma": sigma, "action": action, "condition": condition - branch, "kv": kv, "write": write}
        return runner(fields, lambda model=model, **more: model(x, **arguments, **more))


@dataclass
class PlannedLoop(ToyLoop):
    """A loop that says what each frame of its window is told.

    Frames ahead hold the newest action at first; from chunk 6 on they have a plan, which is what `drive` will command.
    """

    told: list[tuple[float, float]] = field(default_factory=list)

    def step(self, model: ToyModel, action: tuple[float, float], runner: Runner, condition: float = 0.0) -> Tensor:
        position = self.chunk % WINDOW
        ahead = WINDOW - position - 1
        planned = drive(ahead, self.chunk + 1) if self.chunk >= 6 else [action] * ahead
        self.told = [*self.told[:position], action, *planned]

        def telling(fields: dict[str, Any], run: Callable[..., Tensor]) -> Tensor:
            if fields.get("role") != "kv_update":
                fields = {**fields, "frame_actions": self.told, "shown": position}
            return runner(fields, run)

        return super().step(model, action, telling, condition)


@dataclass
class Flight:
    """A chunk in flight."""

    noise: Tensor
    clean: Tensor
    action: tuple[float, float]
    index: int = 0


@dataclass
class StaggeredLoop(ToyLoop):
    """One stream with three chunks of one frame in flight, a third of their steps apart, which take turns.

    Each chunk opens one and brings the oldest to its end; every fourth is committed then.
    """

    sigmas: tuple[float, ...] = MANY
    flights: dict[int, Flight] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, model: ToyModel, action: tuple[float, float], runner: Runner, condition: float = 0.0) -> Tensor:
        """Open a chunk and go on with all; the oldest as it is then, ``[1, PER_FRAME, CHANNELS]``."""
        source = torch.Generator().manual_seed(1000 * self.seed + self.chunk)
        noise = torch.randn(1, PER_FRAME, CHANNELS, generator=source)
        self.flights[self.chunk] = Flight(noise, torch.zeros_like(noise), action)
        self.chunk += 1
        for _ in range(len(self.sigmas) // 3):
            for chunk, flight in self.flights.items():
                sigma = self.sigmas[flight.index]
                noisy = (1 - sigma) * flight.clean + sigma * flight.noise
                flight.clean = self._denoise(model, runner, chunk, flight.index, noisy, flight.action, condition)
                flight.index += 1
        chunk, oldest = next(iter(self.flights.items()))
        if oldest.index == len(self.sigmas):
            del self.flights[chunk]
            if chunk % WINDOW == 0:
                self._commit(model, runner, chunk, oldest.clean, torch.tensor([oldest.action]), condition)
        return oldest.clean


def plain(fields: dict[str, Any], run: Callable[..., Tensor]) -> Tensor:
    """Runs every pass as it is."""
    return run()


def cached(cache: Any) -> Runner:
    """Runs every pass within a step of the cache."""

    def runner(fields: dict[str, Any], run: Callable[..., Tensor]) -> Tensor:
        with cache.step(**fields):
            return run()

    return runner


def chunks_apart(runner: Runner) -> Runner:
    """Runs every pass in a stream of its chunk's own."""
    return lambda fields, run: runner({**fields, "stream": str(fields["chunk"])}, run)


def drive(chunks: int, start: int = 0) -> Iterator[tuple[float, float]]:
    """Commanded speed and curvature: steady, a gentle turn, then a sudden stop in the middle of a cycle."""
    for n in range(start, start + chunks):
        curvature = 0.02 * math.sin(n / 3) if n < 8 else 0.6
        yield (0.8 if n < 14 else 0.1), curvature


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

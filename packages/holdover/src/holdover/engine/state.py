"""What is held over for a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holdover.engine import condition as conditions
from holdover.engine.step import Step

#: Chunks whose chunk numbers a stream remembers: more than ever are in flight at once.
RECENT = 64


#: In place of a block's number: any block of the span.
ANY = -1


class Key(NamedTuple):
    """Of a slot's state: guidance branch, chunk, pass index (None where these share state) and first block."""

    branch: str
    chunk: int | None
    pass_index: int | None
    block: int


@dataclass(slots=True, kw_only=True)
class Held:
    """What one slot remembers. Replaced, not changed, so that a pass that fails can be taken back.

    Attributes:
        tensors: the predictor's tensors and, under ``"signal"``, the signal.
        numbers: the gate's running numbers.
        extras: per block what it returned beside the hidden state when last computed; under `ANY`, what stands for all.
        chunk: the stream's count of chunks when it was computed.
        epoch: the branch's count of condition changes then.
        action: the action then.
        shape, dtype, device: of the hidden state that entered.
        out_dtype: of the one that left.
        void: why nothing can be reused from it, or None.
        shared: another stream may hold the same tensors, so that nobody may write into them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    extras: Mapping[int, tuple[Any, ...]] = field(default_factory=dict)
    chunk: int
    epoch: int
    action: tuple[float, ...] | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    out_dtype: torch.dtype
    void: str | None = None
    shared: bool = False

    @property
    def nbytes(self) -> int:
        total = 0
        for tensor in self.tensors.values():
            total += tensor.nbytes
        for items in self.extras.values():
            total += sum(item.nbytes for item in items if isinstance(item, Tensor))
        return total

    def all_tensors(self) -> Iterator[Tensor]:
        yield from self.tensors.values()
        for items in self.extras.values():
            yield from (item for item in items if isinstance(item, Tensor))

    def updated(self, numbers: Mapping[str, float], tensors: Mapping[str, Tensor]) -> Held:
        """The same, but for these numbers and tensors."""
        return Held(  # spelled out: `replace` takes several times as long, and every score comes by here
            tensors={**self.tensors, **tensors} if tensors else self.tensors,
            numbers={**self.numbers, **numbers},
            extras=self.extras,
            chunk=self.chunk,
            epoch=self.epoch,
            action=self.action,
            shape=self.shape,
            dtype=self.dtype,
            device=self.device,
            out_dtype=self.out_dtype,
            void=self.void,
            shared=self.shared,
        )

    def voided(self, reason: str) -> Held:
        """Its numbers alone: the gate's memory outlives what was held."""
        return replace(self, tensors={}, extras={}, void=reason)


class FullChunk(NamedTuple):
    """A chunk whose every block was computed at every pass."""

    chunk: int
    action: tuple[float, ...] | None


@dataclass(slots=True)
class Run:
    """One branch of a chunk, as far as it has run.

    ``epoch`` is the branch's count of condition changes before this chunk, ``idle`` the passes of the branch since
    this chunk's latest.
    """

    num_steps: int
    action: tuple[float, ...] | None
    epoch: int
    indices: set[int] = field(default_factory=set)
    exact: bool = True
    idle: int = 0

    @property
    def over(self) -> bool:
        """Whether all its passes ran, or it was left alone for as many passes as it has and so was given up."""
        return len(self.indices) == self.num_steps or self.idle >= self.num_steps

    def copy(self) -> Run:
        return replace(self, indices=set(self.indices))


@dataclass(slots=True)
class ChunkState:
    """All passes that make one chunk."""

    ordinal: int
    commits: bool
    runs: dict[str, Run] = field(default_factory=dict)
    #: Whether a gate was asked, that is, whether anything could have been reused.
    asked: bool = False
    warm_up: bool = False
    #: Where guidance branches share a decision: per pass index and first block, which branch led and whether it reused.
    shared: dict[tuple[int, int], tuple[str, bool]] = field(default_factory=dict)

    def copy(self) -> ChunkState:
        runs = {branch: run.copy() for branch, run in self.runs.items()}
        return ChunkState(self.ordinal, self.commits, runs, self.asked, self.warm_up, dict(self.shared))


@dataclass(slots=True)
class Condition:
    """The condition of a branch: by value, or, after a restore, by digest."""

    epoch: int
    frozen: Any = None
    digest: str | None = None
    by_digest: bool = False

    def changed_to(self, condition: Any) -> bool:
        if condition is None and self.frozen is None and not self.by_digest:
            return False
        if self.by_digest:
            return self.digest is None or conditions.digest(conditions.freeze(condition)) != self.digest
        return not conditions.same(self.frozen, condition)


@dataclass(slots=True)
class Stream:
    """Everything held over for one video."""

    held: dict[Key, Held] = field(default_factory=dict)
    chunks: dict[int, ChunkState] = field(default_factory=dict)
    #: Distinct chunks since reset.
    count: int = 0
    latest: int | None = None
    conditions: dict[str, Condition] = field(default_factory=dict)
    full: dict[str, FullChunk] = field(default_factory=dict)
    #: Reused spans since reset: the audit's sample counts along.
    reuses: int = 0
    alarmed: bool = False
    #: Chunks in a row in which no gate was asked; None once one was.
    barren: int | None = 0
    nbytes: int = 0

    def fork(self) -> Stream:
        """A copy that shares what is held, until either replaces it."""
        for held in self.held.values():
            held.shared = True
        return Stream(
            held=dict(self.held),
            chunks={number: chunk.copy() for number, chunk in self.chunks.items()},
            count=self.count,
            latest=self.latest,
            conditions=dict(self.conditions),
            full=dict(self.full),
            reuses=self.reuses,
            alarmed=self.alarmed,
            barren=self.barren,
            nbytes=self.nbytes,
        )

    def find(self, step: Step) -> tuple[ChunkState, Run | None] | tuple[None, None]:
        """A step's chunk, and the branch's run of it, as far as there are any.

        Raises:
            ValueError: ``commits``, or the branch's ``action`` or ``num_steps``, changed within the chunk.
        """
        chunk = self.chunks.get(step.chunk)
        if chunk is None:
            return None, None
        where = f"within chunk {step.chunk} of stream {step.stream!r}"
        if chunk.commits != step.commits:
            raise ValueError(
                f"commits changed to {step.commits} {where}; say it from the chunk's first pass on, and number "
                f"every chunk anew"
            )
        run = chunk.runs.get(step.branch)
        if run is not None and run.num_steps != step.num_steps:
            raise ValueError(f"num_steps changed from {run.num_steps} to {step.num_steps} {where}")
        if run is not None and run.action != step.action_vector:
            raise ValueError(
                f"action changed from {run.action} to {step.action_vector} {where}; a chunk takes one action, "
                f"the next chunk the next"
            )
        return chunk, run

    def open(self, step: Step) -> ChunkState:
        """The chunk of a step, new if its chunk is."""
        chunk = self.chunks.get(step.chunk)
        if chunk is None:
            self._close_latest()
            chunk = self.chunks[step.chunk] = ChunkState(self.count, step.commits)
            self.count += 1
            if len(self.chunks) > RECENT:
                del self.chunks[next(iter(self.chunks))]
        self.latest = step.chunk
        return chunk

    def free(self, branch: str) -> None:
        """Give up what the chunks of a branch that are over held for themselves."""
        runs = ((chunk.ordinal, chunk.runs.get(branch)) for chunk in self.chunks.values())
        in_flight = {None, *(ordinal for ordinal, run in runs if run and not run.over)}
        self.held = {k: held for k, held in self.held.items() if k.branch != branch or k.chunk in in_flight}
        self.nbytes = sum(held.nbytes for held in self.held.values())

    def give_up(self, chunk: int) -> None:
        """Free what a chunk holds for itself, though not all its passes ran."""
        state = self.chunks.get(chunk)
        for branch, run in state.runs.items() if state else ():
            run.idle = run.num_steps
            self.free(branch)

    def _close_latest(self) -> None:
        """Count how many chunks in a row gave the gate nothing to decide, warm-up left out."""
        latest = self.chunks.get(self.latest) if self.latest is not None else None
        if latest is None or self.barren is None:
            return
        if latest.asked:
            self.barren = None
        elif not latest.warm_up:
            self.barren += 1

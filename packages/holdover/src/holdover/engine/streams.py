"""What is remembered of a stream, one video: cache entries, chunks, conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import ReferenceType

from torch import Tensor

from holdover.engine import condition as conditions
from holdover.method import Entry
from holdover.step import Step

#: How many chunks a stream remembers: more than are ever in flight at once.
RECENT = 64


class Key(NamedTuple):
    """Of an entry: guidance branch, chunk and pass index (None where these share entries), and the first block."""

    branch: str
    chunk: int | None
    pass_index: int | None
    block: int


@dataclass(slots=True)
class BranchRun:
    """The passes of one guidance branch of a chunk so far.

    ``epoch`` is the branch's count of condition changes before this chunk, ``latest`` its count of passes at this
    chunk's latest, ``drafts`` the latent frames that some pass did not compute.
    """

    num_steps: int
    action: tuple[tuple[float, ...], ...] | None
    epoch: int
    indices: set[int] = field(default_factory=set)
    exact: bool = True
    latest: int = 0
    drafts: set[int] = field(default_factory=set)

    def over(self, passes: int) -> bool:
        """All its passes ran, or as many passes of other chunks as it has came after its latest: it was given up."""
        return len(self.indices) == self.num_steps or passes - self.latest >= self.num_steps

    def copy(self) -> BranchRun:
        return replace(self, indices=set(self.indices), drafts=set(self.drafts))


@dataclass(slots=True)
class ChunkState:
    """All passes that make one chunk.

    ``ordinal`` counts the stream's chunks. ``asked``: a guard let something pass, so it could have been reused.
    ``shared``: where guidance branches share decisions, per pass index and first block which branch decided, and
    whether it reused.
    """

    ordinal: int
    commits: bool
    runs: dict[str, BranchRun] = field(default_factory=dict)
    asked: bool = False
    warm_up: bool = False
    shared: dict[tuple[int, int], tuple[str, bool]] = field(default_factory=dict)

    def copy(self) -> ChunkState:
        runs = {branch: run.copy() for branch, run in self.runs.items()}
        return ChunkState(self.ordinal, self.commits, runs, self.asked, self.warm_up, dict(self.shared))


@dataclass(slots=True)
class Condition:
    """The condition of a branch: its value, or, after a restore, its digest. ``epoch`` counts its changes."""

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


@dataclass(frozen=True, slots=True)
class Run:
    """What is known of several spans in a row before they run. It holds as long as their entries do.

    Attributes:
        signals: of the entries; an entry that is made anew has another one.
        then: these signals, stacked.
        change: stacked, what the spans before each of them add to the signal of the first one's input.
        spans, added: what so many of them, reused as a whole, add to the hidden state.
    """

    signals: tuple[ReferenceType[Tensor], ...]
    then: Tensor
    change: Tensor
    spans: int = 0
    added: Tensor | None = None

    def holds_for(self, signals: Sequence[Tensor]) -> bool:
        """Whether it was made of entries with these signals."""
        return len(signals) == len(self.signals) and all(
            known() is own for known, own in zip(self.signals, signals, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the entries do not hold."""
        return self.change.nbytes + (0 if self.added is None else self.added.nbytes)


@dataclass(slots=True)
class Stream:
    """Everything that is remembered of one video under one policy.

    Attributes:
        entries: the cache entries.
        chunks: the recent chunks by number; ``latest`` is the newest one's, ``count`` how many there were since reset.
        conditions: per branch the current condition.
        full_actions: per branch what the latest chunk that was computed in full was told.
        held: the number of the latest chunk that ran no pass.
        passes: per branch how many there were.
        runs: what is known of spans in a row, by the first one's key; made anew from the entries.
        reach: per branch and pass index, how many spans to decide at once.
        reuses: reused spans since reset; the audit draws its sample by it.
        alarmed: an audit found an error past its limit.
        barren: chunks in a row in which no trigger was asked; None once one was.
        nbytes: bytes of the entries' tensors, and of what is known of runs.
    """

    entries: dict[Key, Entry] = field(default_factory=dict)
    chunks: dict[int, ChunkState] = field(default_factory=dict)
    count: int = 0
    latest: int | None = None
    conditions: dict[str, Condition] = field(default_factory=dict)
    full_actions: dict[str, tuple[tuple[float, ...], ...] | None] = field(default_factory=dict)
    held: int | None = None
    passes: dict[str, int] = field(default_factory=dict)
    runs: dict[Key, Run] = field(default_factory=dict)
    reach: dict[tuple[str, int], int] = field(default_factory=dict)
    reuses: int = 0
    alarmed: bool = False
    barren: int | None = 0
    nbytes: int = 0

    def fork(self) -> Stream:
        """A copy that shares the entries' tensors until either stream replaces them."""
        for entry in self.entries.values():
            entry.shared = True
        return replace(
            self,
            entries=dict(self.entries),
            chunks={number: chunk.copy() for number, chunk in self.chunks.items()},
            conditions=dict(self.conditions),
            full_actions=dict(self.full_actions),
            passes=dict(self.passes),
            runs=dict(self.runs),
            reach=dict(self.reach),
        )

    def find(self, step: Step) -> tuple[ChunkState, BranchRun | None] | tuple[None, None]:
        """A step's chunk and the branch's run of it, where there are any.

        Raises:
            ValueError: this pass ran already, or ``commits``, or what the branch is told or its ``num_steps``,
                changed within the chunk.
        """
        chunk = self.chunks.get(step.chunk)
        if chunk is None:
            self._require_not_held(step.chunk, step.stream)
            return None, None
        where = f"within chunk {step.chunk} of stream {step.stream!r}"
        if chunk.commits != step.commits:
            raise ValueError(
                f"commits changed to {step.commits} {where}; say it from the chunk's first pass on, and number "
                f"every chunk anew"
            )
        run = chunk.runs.get(step.branch)
        if run is not None and step.index in run.indices:
            raise ValueError(
                f"pass {step.index} {where} ran already; call reset({step.stream!r}) before another video or give it "
                f"a stream= of its own, number every chunk anew, and name guidance branches with branch="
            )
        if run is not None and run.num_steps != step.num_steps:
            raise ValueError(f"num_steps changed from {run.num_steps} to {step.num_steps} {where}")
        if run is not None and run.action != step.told:
            raise ValueError(
                f"what its frames are told changed from {run.action} to {step.told} {where}; a chunk takes one action "
                f"and one plan, the next chunk the next"
            )
        return chunk, run

    def open(self, step: Step) -> ChunkState:
        """The chunk of a step, a new one if its number is new."""
        chunk = self.chunks.get(step.chunk)
        if chunk is None:
            self._close_latest()
            chunk = self.chunks[step.chunk] = ChunkState(self.count, step.commits)
            self.count += 1
            if len(self.chunks) > RECENT:
                del self.chunks[next(iter(self.chunks))]
        self.latest = step.chunk
        return chunk

    def hold(self, chunk: int, stream: str) -> None:
        """A chunk runs no pass. It counts neither for warm-up nor for staleness.

        Raises:
            ValueError: it ran passes, or was held already.
        """
        if chunk in self.chunks:
            raise ValueError(f"chunk {chunk} of stream {stream!r} ran passes, so it is not held; number chunks anew")
        self._require_not_held(chunk, stream)
        self.held, self.barren = chunk, None  # there is nothing wrong with a loop that needs no pass at all

    def _require_not_held(self, chunk: int, stream: str) -> None:
        if chunk == self.held:
            raise ValueError(f"chunk {chunk} of stream {stream!r} was held, without a pass; number every chunk anew")

    def exact(self, branch: str) -> bool:
        """Whether every block call of the branch's latest chunk was computed so far; False before the first."""
        chunk = self.chunks.get(self.latest) if self.latest is not None else None
        run = chunk.runs.get(branch) if chunk else None
        return run is not None and run.exact

    @property
    def drafts(self) -> set[int]:
        """The latent frames that some pass of the latest chunk did not compute."""
        chunk = self.chunks.get(self.latest) if self.latest is not None else None
        return set().union(*(run.drafts for run in chunk.runs.values())) if chunk else set()

    def free(self, branch: str) -> None:
        """Drop the entries that serve a chunk of this branch which is over."""
        runs = ((chunk.ordinal, chunk.runs.get(branch)) for chunk in self.chunks.values())
        passes = self.passes.get(branch, 0)
        in_flight = {None, *(ordinal for ordinal, run in runs if run and not run.over(passes))}
        self.keep([key for key in self.entries if key.branch != branch or key.chunk in in_flight])

    def is_over(self, chunk: ChunkState) -> bool:
        """Whether no branch of a chunk has a pass left."""
        return all(run.over(self.passes[branch]) for branch, run in chunk.runs.items())

    def end(self, chunk: ChunkState) -> None:
        """Free the tensors that serve this chunk alone, once all its branches are over; the triggers' numbers stay."""
        if not self.is_over(chunk):
            return
        for key, entry in self.entries.items():
            if key.chunk == chunk.ordinal and entry.void is None:
                self.nbytes -= entry.nbytes
                self.entries[key] = entry.voided("over")

    def give_up(self, chunk: int) -> None:
        """Drop the entries that serve one chunk, if not all its passes ran."""
        state = self.chunks.get(chunk)
        if state is None or self.is_over(state):
            return
        for branch, run in state.runs.items():
            run.latest = self.passes[branch] - run.num_steps
            self.free(branch)

    def restarted(self) -> Stream:
        """A new stream, which goes on counting the chunks in which no trigger was asked."""
        self._close_latest()
        return Stream(barren=self.barren)

    def keep(self, keys: Sequence[Key]) -> None:
        """Keep these entries alone."""
        self.entries, self.runs = {key: self.entries[key] for key in keys}, {}
        self.count_bytes()

    def count_bytes(self) -> None:
        """Count the bytes of all tensors anew."""
        self.nbytes = sum(entry.nbytes for entry in self.entries.values())
        self.nbytes += sum(run.nbytes for run in self.runs.values())

    def _close_latest(self) -> None:
        """Count how many chunks in a row asked no trigger, warm-up left out."""
        latest = self.chunks.get(self.latest) if self.latest is not None else None
        if latest is None or self.barren is None or not self.is_over(latest):
            return  # a chunk that is still in flight may yet be asked
        if latest.asked:
            self.barren = None
        elif not latest.warm_up:
            self.barren += 1

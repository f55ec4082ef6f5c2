"""The trace of what was decided, and counts of it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, overload

from holdover.decision import WARM_UP, AuditResult, Decision, Stats
from holdover.step import Role, Step


@dataclass(slots=True)
class Place:
    """Where a pass stands, of its `Step` no more than the trace tells: conditions must not live as long as it does."""

    stream: str
    branch: str
    chunk: int
    index: int
    role: Role
    sigma: float | None


def place(step: Step) -> Place:
    assert step.sigma is None or isinstance(step.sigma, float)
    return Place(step.stream, step.branch, step.chunk, step.index, step.role, step.sigma)


@dataclass(slots=True)
class Note:
    """What was decided for one row of a pass, for a run of blocks at once.

    Attributes:
        blocks: name and number of those that ran; the rows of a pass share the list.
        audit: relative error of a reused span, noted beside its last block.
    """

    place: Place
    blocks: list[tuple[str, int]]
    computed: bool
    reason: str
    scores: Mapping[str, float]
    audit: float | None = None

    def decision(self, n: int) -> Decision:
        """What it says of its n-th block."""
        scores = self.scores
        if self.audit is not None and n == len(self.blocks) - 1:
            scores = {**scores, "audit": self.audit}
        at, (slot, block) = self.place, self.blocks[n]
        return Decision(
            stream=at.stream,
            branch=at.branch,
            chunk=at.chunk,
            index=at.index,
            slot=slot,
            block=block,
            role=at.role,
            computed=self.computed,
            reason=self.reason,
            scores=scores,
            sigma=at.sigma,
        )


class Trace(Sequence[Decision]):
    """The latest decisions since `attach` or `clear`, pass by pass; a pass that failed leaves none.

    Within a pass they are told span by span, and within a span row by row. Of more than ``limit`` decisions the oldest
    are dropped; ``dropped`` counts them.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"trace={limit}: give how many decisions to keep, 1 or more")
        self.limit = limit
        self.dropped = 0
        self._notes: list[Note] = []
        self._ends: list[int] = []  # decisions up to and with each note, dropped ones included

    @overload
    def __getitem__(self, index: int) -> Decision: ...
    @overload
    def __getitem__(self, index: slice) -> list[Decision]: ...
    def __getitem__(self, index: int | slice) -> Decision | list[Decision]:
        places = range(len(self))[index]
        if isinstance(places, int):
            return self._at(places)
        return [self._at(place) for place in places]

    def __len__(self) -> int:
        return self._ends[-1] - self.dropped if self._ends else 0

    def __iter__(self) -> Iterator[Decision]:
        for note in self._notes:
            yield from map(note.decision, range(len(note.blocks)))

    def __repr__(self) -> str:
        return f"<Trace of {len(self)} decisions>"

    def extend(self, notes: Iterable[Note]) -> None:
        total = self._ends[-1] if self._ends else self.dropped
        for note in notes:
            total += len(note.blocks)
            self._ends.append(total)
            self._notes.append(note)
        if total - self.dropped > self.limit + self.limit // 4:  # now and then, and then many at once
            old = bisect_left(self._ends, total - self.limit)
            self.dropped = self._ends[old - 1] if old else self.dropped
            del self._notes[:old], self._ends[:old]

    def clear(self) -> None:
        """Forget them all."""
        self.dropped = 0
        self._notes.clear()
        self._ends.clear()

    def _at(self, place: int) -> Decision:
        place += self.dropped
        at = bisect_right(self._ends, place)
        return self._notes[at].decision(place - self._ends[at] + len(self._notes[at].blocks))

    def to_records(self) -> list[dict[str, Any]]:
        """The decisions as plain dictionaries, ready for JSON."""
        names = [field.name for field in fields(Decision)]
        return [
            {name: getattr(decision, name) for name in names} | {"scores": dict(decision.scores)} for decision in self
        ]


@dataclass(slots=True)
class Tally:
    """Running counts of one stream."""

    reasons: Counter[str] = field(default_factory=Counter)
    reused: int = 0
    computed: int = 0
    #: Denoising block calls after warm-up: what the skip rate is a share of.
    skippable: int = 0
    held_chunks: int = 0
    audits: int = 0
    audit_sum: float = 0.0
    audit_max: float = 0.0
    alarmed: bool = False

    def count(self, note: Note) -> None:
        blocks = len(note.blocks)
        self.reasons[note.reason] += blocks
        if note.computed:
            self.computed += blocks
        else:
            self.reused += blocks
        if note.place.role == "denoise" and note.reason != WARM_UP:
            self.skippable += blocks

    def count_audit(self, error: float) -> None:
        self.audits += 1
        self.audit_sum += error
        self.audit_max = max(self.audit_max, error)

    def add(self, other: Tally) -> None:
        self.reasons.update(other.reasons)
        self.reused += other.reused
        self.computed += other.computed
        self.skippable += other.skippable
        self.held_chunks += other.held_chunks
        self.audits += other.audits
        self.audit_sum += other.audit_sum
        self.audit_max = max(self.audit_max, other.audit_max)
        self.alarmed |= other.alarmed

    def stats(self, bytes_held: int) -> Stats:
        audit = None
        if self.audits:
            audit = AuditResult(
                samples=self.audits,
                mean_error=self.audit_sum / self.audits,
                max_error=self.audit_max,
                alarmed=self.alarmed,
            )
        return Stats(
            computed=self.computed,
            reused=self.reused,
            skip=self.reused / self.skippable if self.skippable else 0.0,
            bytes_held=bytes_held,
            reasons=dict(self.reasons),
            audit=audit,
            held_chunks=self.held_chunks,
        )

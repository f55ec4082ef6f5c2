"""A session as a server sees it, what watches it, and what users may take."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from holdover_world.server.protocol import FrameFormat, Message, Mode
from holdover_world.sessions.session import SessionSnapshot, WorldSession


class RefusedError(Exception):
    """What was asked cannot be had: an HTTP status and a line for the user."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server allows.

    Attributes:
        sessions: in all, parked ones included.
        sessions_per_owner: of them for one token.
        snapshots_per_owner: that one token may keep.
        max_bytes: of sessions and snapshots in memory; what is idle goes to disk, the least recently used first.
        batch: sessions of one forward pass.
        unacknowledged: chunks sent, or waiting to be, that the client has not acknowledged: then it waits.
        park_after: seconds without a reader after which a session goes to disk.
        expire_after: seconds without a reader after which a session is deleted.
    """

    sessions: int = 64
    sessions_per_owner: int = 16
    snapshots_per_owner: int = 64
    max_bytes: int = 4 * 2**30
    batch: int = 16
    unacknowledged: int = 4
    park_after: float = 60.0
    expire_after: float = 3600.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value}: give a positive number")


class Reader:
    """The connection that watches a session: what waits for it, beside the chunks."""

    def __init__(self, sent: int) -> None:
        self.sent = sent  # the newest chunk handed to the socket
        self.notes: deque[Message] = deque(maxlen=16)
        self.wake = asyncio.Event()
        self.ended: int | None = None  # the code with which to close it

    def end(self, code: int) -> None:
        self.ended = code
        self.wake.set()

    def note(self, message: Message) -> None:
        self.notes.append(message)
        self.wake.set()


@dataclass(kw_only=True)
class Seat:
    """A session as it is served. ``session`` is None while it is parked."""

    id: str
    owner: str
    scenario: str
    seed: int
    policy: str
    format: FrameFormat
    mode: Mode
    chunk: int = 0
    seq_seen: int = -1
    seq_applied: int = -1
    nbytes: int = 0
    session: WorldSession | None = None
    action: list[float] = field(default_factory=list)
    #: When the action that is still to be applied arrived; None where none is.
    arrived: float | None = None
    #: When the next chunk of a real-time session is due.
    due: float = 0.0
    outbox: deque[tuple[int, bytes]] = field(default_factory=deque)
    #: Chunks before this one may be sent: those that are on disk where that is asked for.
    published: int = 0
    reader: Reader | None = None
    busy: bool = False
    wanted: int = 0  # calls that wait until it is not busy
    created: float | None = None
    touched: float = field(default_factory=time.monotonic)

    _STORED: ClassVar = (
        *("id", "owner", "scenario", "seed", "policy", "format", "mode"),
        *("chunk", "seq_seen", "seq_applied", "nbytes", "action"),
    )

    def stored(self) -> dict[str, Any]:
        """What goes to disk beside the session and what waits to be sent."""
        return {name: getattr(self, name) for name in self._STORED}

    @property
    def first(self) -> int:
        """The first chunk that can be sent."""
        return self.outbox[0][0] if self.outbox else self.chunk

    def acknowledge(self, index: int) -> None:
        while self.outbox and self.outbox[0][0] <= index:
            self.outbox.popleft()


@dataclass(kw_only=True)
class Shelved:
    """A snapshot that a user asked for; on disk where ``snapshot`` is None."""

    id: str
    seat: Seat  # as it was
    nbytes: int
    snapshot: SessionSnapshot | None


def owner_of(token: str) -> str:
    """A token's owner: a name that does not give the token away."""
    return hashlib.sha256(token.encode()).hexdigest()[:16]


def twin_of(seat: Seat) -> Seat:
    """A new seat that stands where this one does, with nothing to send."""
    return Seat(
        id=secrets.token_hex(8), owner=seat.owner, scenario=seat.scenario, seed=seat.seed, policy=seat.policy,
        format=seat.format, mode=seat.mode, chunk=seat.chunk, seq_seen=seat.seq_seen,
        seq_applied=seat.seq_applied, action=list(seat.action), nbytes=seat.nbytes, published=seat.chunk,
    )  # fmt: skip


def seat_of(taken: SessionSnapshot) -> Seat:
    """The seat of a parked session."""
    stored = dict(taken.plain["seat"])
    waiting = sorted(int(name[7:]) for name in taken.tensors if name.startswith("outbox."))
    seat = Seat(**stored)
    seat.seq_seen = seat.seq_applied  # what was seen but not applied is the client's to send again
    seat.published = seat.chunk
    seat.outbox.extend((n, taken.tensors[f"outbox.{n}"].numpy().tobytes()) for n in waiting)
    return seat

"""A session as the server holds it, the connection that reads it, and the limits of users."""

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
    """A refused request: an HTTP status and one line for the user."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a server.

    Attributes:
        sessions: sessions in all, parked ones included.
        sessions_per_owner: sessions of one token.
        snapshots_per_owner: snapshots of one token.
        max_bytes: bytes of sessions and snapshots in memory. Beyond it the least recently used idle ones go to disk.
        batch: sessions in one forward pass.
        unacknowledged: chunks that the client has not acknowledged. At this number the session waits.
        park_after: seconds without a reader after which a session goes to disk.
        expire_after: seconds without a reader after which a session is deleted.

    Raises:
        ValueError: a limit is not positive.
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
    """The connection that reads a session, with its waiting messages other than chunks."""

    def __init__(self, sent: int) -> None:
        self.sent = sent  # the newest chunk handed to the socket
        self.notes: deque[Message] = deque(maxlen=16)
        self.wake = asyncio.Event()
        self.ended: int | None = None  # the code with which to close the connection

    def end(self, code: int) -> None:
        self.ended = code
        self.wake.set()

    def note(self, message: Message) -> None:
        self.notes.append(message)
        self.wake.set()


@dataclass(kw_only=True)
class Seat:
    """A session of a user. ``session`` is None while it is parked on disk."""

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
    #: What is intended after the waiting action.
    plan: list[list[float]] | None = None
    #: When the waiting action arrived; None if none waits.
    arrived: float | None = None
    #: When the next chunk of a real-time session is due.
    due: float = 0.0
    #: Numbers and messages of the chunks that are not acknowledged.
    outbox: deque[tuple[int, bytes]] = field(default_factory=deque)
    #: Chunks before this one may be sent: on a durable server those that are on disk.
    published: int = 0
    reader: Reader | None = None
    busy: bool = False
    wanted: int = 0  # calls that wait until the seat is not busy
    created: float | None = None
    touched: float = field(default_factory=time.monotonic)

    _STORED: ClassVar = (
        *("id", "owner", "scenario", "seed", "policy", "format", "mode"),
        *("chunk", "seq_seen", "seq_applied", "nbytes", "action"),
    )

    def stored(self) -> dict[str, Any]:
        """The fields that go to disk, beside the session and its unacknowledged chunks."""
        return {name: getattr(self, name) for name in self._STORED}

    @property
    def first(self) -> int:
        """The first chunk that can be sent."""
        return self.outbox[0][0] if self.outbox else self.chunk

    def acknowledge(self, index: int) -> None:
        """Drop the chunks up to this one from the outbox."""
        while self.outbox and self.outbox[0][0] <= index:
            self.outbox.popleft()


@dataclass(kw_only=True)
class StoredSnapshot:
    """A snapshot of a user. It is on disk if ``snapshot`` is None."""

    id: str
    seat: Seat  # as it was when the snapshot was taken
    nbytes: int
    snapshot: SessionSnapshot | None


def owner_of(token: str) -> str:
    """The owner name of a token. It does not reveal the token."""
    return hashlib.sha256(token.encode()).hexdigest()[:16]


def twin_of(seat: Seat) -> Seat:
    """A new seat in the state of this one, with an empty outbox."""
    return Seat(
        id=secrets.token_hex(8), owner=seat.owner, scenario=seat.scenario, seed=seat.seed, policy=seat.policy,
        format=seat.format, mode=seat.mode, chunk=seat.chunk, seq_seen=seat.seq_seen,
        seq_applied=seat.seq_applied, action=list(seat.action), nbytes=seat.nbytes, published=seat.chunk,
    )  # fmt: skip


def seat_of(taken: SessionSnapshot) -> Seat:
    """The seat of a snapshot."""
    stored = dict(taken.plain["seat"])
    waiting = sorted(int(name[7:]) for name in taken.tensors if name.startswith("outbox."))
    seat = Seat(**stored)
    seat.seq_seen = seat.seq_applied  # the client sends actions again that were seen but not applied
    seat.published = seat.chunk
    seat.outbox.extend((n, taken.tensors[f"outbox.{n}"].numpy().tobytes()) for n in waiting)
    return seat

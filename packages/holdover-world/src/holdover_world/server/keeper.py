"""Storage of sessions and snapshots: in memory up to a limit, then on disk."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch

from holdover_world.server.seats import RefusedError, Seat, StoredSnapshot, seat_of
from holdover_world.sessions.session import SessionSnapshot, WorldSession
from holdover_world.sessions.world import World

log = logging.getLogger("holdover_world.server")
T = TypeVar("T")


class Keeper:
    """Holds the sessions and snapshots of a world. The event loop uses the keeper; one other thread runs the world.

    Args:
        world: the world.
        folder: where sessions and snapshots are parked. `load` reads those that are there already.
        max_bytes: the limit on sessions and snapshots in memory.
        thread: the thread that runs the world; by default a new one.
    """

    def __init__(self, world: World, *, folder: Path, max_bytes: int, thread: Executor | None = None) -> None:
        self.world, self.folder, self.max_bytes = world, folder, max_bytes
        self.seats: dict[str, Seat] = {}
        self.snapshots: OrderedDict[str, StoredSnapshot] = OrderedDict()  # least recently used first
        self.wake = asyncio.Event()  # set when the scheduler should look at the seats again
        self._thread = thread or ThreadPoolExecutor(1, "holdover-world")

    async def load(self) -> None:
        """Read the sessions and snapshots that are in the folder. Unreadable files are logged and skipped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*-*.safetensors")):
            kind, _, id = path.stem.partition("-")
            try:
                taken = await asyncio.to_thread(SessionSnapshot.load, path)
                seat = seat_of(taken)
            except (ValueError, KeyError, TypeError) as error:
                log.warning("unreadable", extra={"fields": {"path": path.name, "error": repr(error)}})
                continue
            if kind == "session":
                self.seats[seat.id] = seat
            else:
                self.snapshots[id] = StoredSnapshot(id=id, seat=seat, nbytes=taken.nbytes, snapshot=None)

    async def close(self) -> None:
        """Park every session and write every snapshot."""
        for seat in list(self.seats.values()):
            if seat.session is not None:
                await self.park(seat)
        for stored in list(self.snapshots.values()):
            await self.to_disk(stored)
        self._thread.shutdown()

    @property
    def nbytes(self) -> int:
        """Bytes in memory. Memory that forks share is counted for each of them."""
        live = sum(seat.nbytes for seat in self.seats.values() if seat.session is not None)
        return live + sum(stored.nbytes for stored in self.snapshots.values() if stored.snapshot is not None)

    async def make_room(self, wanted: int) -> None:
        """Move snapshots, then idle sessions to disk until ``wanted`` more bytes fit into memory.

        Raises:
            RefusedError: they do not fit.
        """
        for stored in list(self.snapshots.values()):
            if self.nbytes + wanted <= self.max_bytes:
                return
            await self.to_disk(stored)
        for seat in sorted(self.seats.values(), key=lambda seat: seat.touched):
            if self.nbytes + wanted <= self.max_bytes:
                return
            if seat.session is not None and seat.reader is None and not seat.busy and seat.arrived is None:
                async with Claim(self, seat):
                    await self.park(seat)
        if wanted and self.nbytes + wanted > self.max_bytes:
            raise RefusedError(503, f"memory is full: {self.nbytes} of {self.max_bytes} bytes; try again later")

    async def awake(self, seat: Seat) -> WorldSession:
        """The seat's session; it is read from disk if it is parked."""
        if seat.session is None:
            await self.make_room(seat.nbytes)
            taken = await asyncio.to_thread(SessionSnapshot.load, self.path("session", seat.id))
            seat.session = await self.on_thread(lambda: self.restored(taken))
        return seat.session

    def restored(self, taken: SessionSnapshot) -> WorldSession:
        """A new session that continues from a snapshot."""
        session = WorldSession(self.world)
        try:
            session.restore(taken)
        except BaseException:
            session.close()
            raise
        return session

    async def save(self, seat: Seat) -> None:
        """Write the seat's session and its unacknowledged chunks to disk."""
        session = seat.session
        assert session is not None
        waiting = {f"outbox.{n}": torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for n, data in seat.outbox}

        def write() -> None:
            taken = session.snapshot()
            whole = SessionSnapshot(plain={**taken.plain, "seat": seat.stored()}, tensors={**taken.tensors, **waiting})
            whole.save(self.path("session", seat.id))

        await self.on_thread(write)

    async def park(self, seat: Seat) -> None:
        """Write the seat's session to disk and free its memory."""
        session = seat.session
        assert session is not None
        await self.save(seat)
        await self.on_thread(session.close)
        seat.session = None
        log.info("parked", extra={"fields": {"id": seat.id}})

    async def to_disk(self, stored: StoredSnapshot) -> None:
        """Write a snapshot to disk and free its memory."""
        if stored.snapshot is not None:
            taken, stored.snapshot = stored.snapshot, None
            await asyncio.to_thread(taken.save, self.path("snapshot", stored.id))

    def path(self, kind: str, id: str) -> Path:
        return self.folder / f"{kind}-{id}.safetensors"

    async def on_thread(self, work: Callable[[], T]) -> T:
        """Run work on the world's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class Claim:
    """Exclusive use of a seat, as a context manager; waits until the seat is free."""

    def __init__(self, keeper: Keeper, seat: Seat) -> None:
        self._keeper, self._seat = keeper, seat

    async def __aenter__(self) -> None:
        self._seat.wanted += 1
        try:
            while self._seat.busy:
                await asyncio.sleep(0.005)
        finally:
            self._seat.wanted -= 1
        if self._seat.id not in self._keeper.seats:
            raise RefusedError(404, f"there is no session {self._seat.id}")
        self._seat.busy = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._seat.busy = False
        self._keeper.wake.set()

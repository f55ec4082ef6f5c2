"""What users can do, and the scheduler that advances their sessions."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from pathlib import Path

from holdover_world.scene.cameras import FPS
from holdover_world.server.frames import encode_frames
from holdover_world.server.keeper import Claim, Keeper
from holdover_world.server.metrics import Metrics
from holdover_world.server.protocol import ChunkMessage, ErrorMessage, NewSession, decision_grid, pack
from holdover_world.server.seats import Limits, Reader, RefusedError, Seat, StoredSnapshot, seat_of, twin_of
from holdover_world.sessions.session import SessionChunk, SessionSnapshot, WorldSession, advance
from holdover_world.sessions.world import World

log = logging.getLogger("holdover_world.server")

#: Close codes: another connection took over, or the session was deleted.
TAKEN_OVER, GONE = 4409, 4404


class Hub:
    """Runs the sessions of one world. The event loop uses the hub; one other thread runs the world.

    Args:
        world: the world.
        limits: how much users may use.
        folder: where sessions and snapshots are parked. Sessions that are there already continue.
        durable: write a session to disk after each chunk, before the chunk is sent. A killed server then loses at most
            the chunk in flight.
        thread: the thread that runs the world; by default a new one.
    """

    def __init__(
        self,
        world: World,
        *,
        limits: Limits | None = None,
        folder: Path,
        durable: bool = False,
        thread: Executor | None = None,
    ) -> None:
        self.world, self.limits, self.durable = world, limits or Limits(), durable
        self.keeper = Keeper(world, folder=folder, max_bytes=self.limits.max_bytes, thread=thread)
        self.metrics = Metrics()
        self.draining = False
        self.period = world.model.sizes.frames_per_latent / FPS
        self._tasks: list[asyncio.Task[None]] = []

    # Start and end.

    async def start(self) -> None:
        await self.keeper.load()
        self._tasks = [asyncio.create_task(self._drive()), asyncio.create_task(self._sweep())]

    async def drain(self) -> None:
        """Finish the chunk in flight, park every session, and stop."""
        self.draining = True
        self.keeper.wake.set()
        for task in self._tasks:
            await task
        await self.keeper.close()
        log.info("drained", extra={"fields": {"sessions": len(self.keeper.seats)}})

    # What users can do.

    def seat(self, owner: str, id: str) -> Seat:
        seat = self.keeper.seats.get(id)
        if seat is None or seat.owner != owner:  # the answer does not tell whether another user has it
            raise RefusedError(404, f"there is no session {id}")
        seat.touched = time.monotonic()
        return seat

    def stored(self, owner: str, id: str) -> StoredSnapshot:
        stored = self.keeper.snapshots.get(id)
        if stored is None or stored.seat.owner != owner:
            raise RefusedError(404, f"there is no snapshot {id}")
        return stored

    async def create(self, owner: str, new: NewSession) -> Seat:
        scenario, policy = new.scenario or next(iter(self.world.starts)), new.policy or self.world.default_policy
        for what, name, known in (
            ("scenario", scenario, list(self.world.starts)),
            ("policy", policy, list(self.world.policies)),
        ):
            if name not in known:
                raise RefusedError(422, f"{what} {name!r} is not one of {', '.join(known)}")
        await self._admit(owner)
        seat = Seat(
            id=secrets.token_hex(8), owner=owner, scenario=scenario, seed=new.seed, policy=policy, format=new.format,
            mode=new.mode, created=time.monotonic(),
        )  # fmt: skip

        def begin() -> WorldSession:
            session = WorldSession(self.world, policy=policy)
            try:
                session.reset(scenario, new.seed)
            except BaseException:
                session.close()
                raise
            return session

        return await self._seated(seat, begin)

    async def fork(self, owner: str, id: str) -> Seat:
        source = self.seat(owner, id)
        async with Claim(self.keeper, source):
            session = await self.keeper.awake(source)
            await self._admit(owner)
            return await self._seated(twin_of(source), session.fork)

    async def snapshot(self, owner: str, id: str) -> StoredSnapshot:
        seat = self.seat(owner, id)
        self._admit_snapshot(owner)
        async with Claim(self.keeper, seat):
            session = await self.keeper.awake(seat)
            taken = await self.keeper.on_thread(session.snapshot)
            taken = SessionSnapshot(plain={**taken.plain, "seat": seat.stored()}, tensors=taken.tensors)
        self._admit_snapshot(owner)  # other calls may have taken one in the meantime
        stored = StoredSnapshot(id=secrets.token_hex(8), seat=seat_of(taken), nbytes=taken.nbytes, snapshot=taken)
        self.keeper.snapshots[stored.id] = stored
        if self.durable:
            await self.keeper.to_disk(stored)
        await self.keeper.make_room(0)
        return stored

    async def restore(self, owner: str, id: str) -> Seat:
        stored = self.stored(owner, id)
        self.keeper.snapshots.move_to_end(id)
        taken = stored.snapshot
        if taken is None:
            taken = await asyncio.to_thread(SessionSnapshot.load, self.keeper.path("snapshot", id))
        await self._admit(owner)
        return await self._seated(twin_of(stored.seat), partial(self.keeper.restored, taken))

    async def delete_snapshot(self, owner: str, id: str) -> None:
        self.stored(owner, id)
        del self.keeper.snapshots[id]
        self.keeper.path("snapshot", id).unlink(missing_ok=True)

    async def delete(self, owner: str, id: str) -> None:
        seat = self.seat(owner, id)
        async with Claim(self.keeper, seat):
            await self._delete(seat)

    async def use(self, seat: Seat, policy: str) -> None:
        if policy not in self.world.policies:
            raise RefusedError(422, f"policy {policy!r} is not one of {', '.join(self.world.policies)}")
        async with Claim(self.keeper, seat):
            session = await self.keeper.awake(seat)
            await self.keeper.on_thread(lambda: session.use(policy))
            seat.policy = policy

    # What a connection can do.

    def connect(self, seat: Seat, after: int | None) -> Reader:
        """Make a new reader the session's only one. It gets the chunks after ``after``."""
        if after is not None:
            if after >= seat.chunk:
                raise RefusedError(422, f"after={after}, but the next chunk is {seat.chunk}")
            seat.acknowledge(after)
        if seat.reader is not None:
            seat.reader.end(TAKEN_OVER)
        seat.reader = Reader(seat.first - 1)
        seat.reader.wake.set()
        seat.touched = seat.due = time.monotonic()
        self.keeper.wake.set()
        return seat.reader

    def disconnect(self, seat: Seat, reader: Reader) -> None:
        if seat.reader is reader:
            seat.reader = None
            seat.touched = time.monotonic()

    def act(self, seat: Seat, seq: int, action: list[float], plan: list[list[float]] | None = None) -> str | None:
        """Take an action and its plan. Returns a reason if the action is too old, otherwise None."""
        dims = self.world.model.sizes.action_dims
        named = [("action", action), *((f"plan[{n}]", row) for n, row in enumerate(plan or ()))]
        for name, given in named:
            if len(given) != dims:
                raise ValueError(f"{name} has {len(given)} numbers; give {dims}")
        if seq <= seat.seq_seen:
            return f"action {seq} is not newer than the newest, {seat.seq_seen}; it is ignored"
        seat.seq_seen, seat.action, seat.plan = seq, action, plan
        seat.arrived = time.monotonic()
        self.keeper.wake.set()
        return None

    def acknowledge(self, seat: Seat, chunk: int) -> None:
        if chunk >= seat.chunk:
            raise ValueError(f"chunk {chunk} was not sent; the next is {seat.chunk}")
        seat.acknowledge(chunk)
        self.keeper.wake.set()

    # The scheduler.

    async def _drive(self) -> None:
        while not self.draining:
            self.keeper.wake.clear()
            ready = self._ready()
            if not ready:
                due = min((seat.due for seat in self.keeper.seats.values() if self._paced(seat)), default=None)
                wait = None if due is None else max(0.0, due - time.monotonic())
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.keeper.wake.wait(), wait)
                continue
            for seat in ready:
                seat.busy = True
            try:
                await self._generate(ready)
            except Exception:  # an error in one batch must not stop the server
                log.exception("batch failed")
            finally:
                for seat in ready:
                    seat.busy = False

    def _free(self, seat: Seat) -> bool:
        return not seat.busy and not seat.wanted and len(seat.outbox) < self.limits.unacknowledged

    def _paced(self, seat: Seat) -> bool:
        return seat.mode == "realtime" and seat.reader is not None and bool(seat.action) and self._free(seat)

    def _ready(self) -> list[Seat]:
        now = time.monotonic()
        ready = [
            seat
            for seat in self.keeper.seats.values()
            if self._free(seat)
            and ((seat.mode == "lockstep" and seat.arrived is not None) or (self._paced(seat) and seat.due <= now))
        ]
        ready.sort(key=lambda seat: seat.arrived if seat.mode == "lockstep" and seat.arrived else seat.due)
        return ready[: self.limits.batch]

    async def _generate(self, seats: list[Seat]) -> None:
        sessions, awake = [], []
        for seat in seats:
            try:
                sessions.append(await self.keeper.awake(seat))
                awake.append(seat)
            except (RefusedError, OSError, ValueError) as error:  # memory is full, or its file is gone
                log.error("not awake", extra={"fields": {"session": seat.id, "error": repr(error)}})
                seat.due = time.monotonic() + self.period
                self._fail(seat, "the session cannot be read from disk now; try again later")
        if not awake:
            return
        now = time.monotonic()
        taken = [(seat.action, seat.seq_seen, seat.arrived) for seat in awake]
        deadlines = [self.period + (seat.due if seat.arrived is None else seat.arrived) for seat in awake]
        for seat in awake:
            seat.arrived, seat.due = None, max(seat.due + self.period, now)
        actions, plans = [action for action, _, _ in taken], [seat.plan for seat in awake]
        for seat in awake:
            seat.plan = None  # in real time the next chunk may come without a new action: then it has no plan

        def work() -> tuple[list[SessionChunk | Exception], list[dict[str, list[bytes]] | None], list[int]]:
            made = advance(sessions, actions, plans)
            frames = [
                None if isinstance(each, Exception) else encode_frames(each.frames, seat.format, each.index)
                for seat, each in zip(awake, made, strict=True)
            ]
            return made, frames, [session.nbytes for session in sessions]

        made, frames, sizes = await self.keeper.on_thread(work)
        self.metrics.batch.observe(len(awake))
        for n, (seat, each, coded) in enumerate(zip(awake, made, frames, strict=True)):
            seat.nbytes, (_, seq, arrived) = sizes[n], taken[n]
            if isinstance(each, Exception) or coded is None:
                log.error("chunk failed", extra={"fields": {"session": seat.id, "error": repr(each)}})
                self._fail(seat, "the chunk failed; the session is unchanged")
                continue
            done = time.monotonic()
            late = done > deadlines[n]
            message = ChunkMessage(
                index=each.index, seq=seq, policy=seat.policy, format=seat.format, frames=coded,
                decisions=decision_grid(each.decisions), milliseconds=1e3 * each.seconds,
                latency_ms=1e3 * (done - (arrived if arrived is not None else now)), late=late, batch=each.batch,
            )  # fmt: skip
            seat.outbox.append((each.index, pack(message)))
            seat.chunk, seat.seq_applied = each.index + 1, seq
            self._count(seat, each, late, done - arrived if arrived is not None else None)
            if self.durable:
                try:
                    await self.keeper.save(seat)
                except OSError:  # on a full disk the chunk is still sent
                    log.exception("not saved", extra={"fields": {"session": seat.id}})
            seat.published = seat.chunk
            if seat.reader is not None:
                seat.reader.wake.set()

    def _count(self, seat: Seat, made: SessionChunk, late: bool, latency: float | None) -> None:
        metrics, reused = self.metrics, sum(d.reused for d in made.decisions)
        if seat.created is not None:
            metrics.first_frame.observe(time.monotonic() - seat.created)
            seat.created = None
        metrics.chunk.observe(made.seconds)
        metrics.calls.labels("reused").inc(reused)
        metrics.calls.labels("computed").inc(sum(d.computed for d in made.decisions))
        metrics.misses.inc(late)
        if latency is not None:
            metrics.latency.observe(latency)

    def _fail(self, seat: Seat, detail: str) -> None:
        seat.arrived = None
        self.metrics.failures.inc()
        if seat.reader is not None:
            seat.reader.note(ErrorMessage(code="failed", detail=detail))

    async def _admit(self, owner: str) -> None:
        """Refuse a session over the limits. The caller makes the seat without awaiting anything in between."""
        await self.keeper.make_room(max((seat.nbytes for seat in self.keeper.seats.values()), default=0))
        if self.draining:
            raise RefusedError(503, "the server is shutting down; use another")
        if sum(seat.owner == owner for seat in self.keeper.seats.values()) >= self.limits.sessions_per_owner:
            raise RefusedError(429, f"you have {self.limits.sessions_per_owner} sessions, the limit; delete one")
        if len(self.keeper.seats) >= self.limits.sessions:
            raise RefusedError(503, f"all {self.limits.sessions} sessions are in use; try again later")

    def _admit_snapshot(self, owner: str) -> None:
        most = self.limits.snapshots_per_owner
        if sum(stored.seat.owner == owner for stored in self.keeper.snapshots.values()) >= most:
            raise RefusedError(429, f"you have {most} snapshots, the limit; delete one")

    async def _seated(self, seat: Seat, make: Callable[[], WorldSession]) -> Seat:
        """Make the session of a new seat, and add the seat to the others."""
        seat.busy = True
        self.keeper.seats[seat.id] = seat  # before the session is made, so that the limits count it
        try:

            def begin() -> tuple[WorldSession, int]:
                session = make()
                return session, session.nbytes

            seat.session, seat.nbytes = await self.keeper.on_thread(begin)
            if self.durable:
                await self.keeper.save(seat)
        except BaseException:
            self.keeper.seats.pop(seat.id, None)
            raise
        finally:
            seat.busy = False
        log.info("session", extra={"fields": {"id": seat.id, "owner": seat.owner, "scenario": seat.scenario}})
        return seat

    async def _delete(self, seat: Seat) -> None:
        if self.keeper.seats.pop(seat.id, None) is None:
            return
        if seat.reader is not None:
            seat.reader.end(GONE)
        if seat.session is not None:
            await self.keeper.on_thread(seat.session.close)
        self.keeper.path("session", seat.id).unlink(missing_ok=True)
        log.info("deleted", extra={"fields": {"id": seat.id}})

    async def _sweep(self) -> None:
        """Park idle sessions and delete expired ones, until the server drains."""
        while not self.draining:
            await asyncio.sleep(min(1.0, self.limits.park_after / 4))
            for seat in list(self.keeper.seats.values()):
                idle = time.monotonic() - seat.touched
                if seat.reader is not None or seat.busy or seat.arrived is not None:
                    continue
                try:
                    if idle > self.limits.expire_after:
                        await self._delete(seat)
                    elif idle > self.limits.park_after and seat.session is not None:
                        async with Claim(self.keeper, seat):
                            await self.keeper.park(seat)
                except Exception:  # continue with the others
                    log.exception("sweep failed")
            self.observe()

    def observe(self) -> None:
        """Update the gauges."""
        live = sum(seat.session is not None for seat in self.keeper.seats.values())
        self.metrics.sessions.labels("live").set(live)
        self.metrics.sessions.labels("parked").set(len(self.keeper.seats) - live)
        self.metrics.bytes.set(self.keeper.nbytes)

"""The routes: REST for sessions and snapshots, a WebSocket for the video, and the page."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from pydantic import TypeAdapter
from starlette.datastructures import State

from holdover_world.scene.cameras import FPS
from holdover_world.server.access import SUBPROTOCOL, Access, BodyLimit, plain
from holdover_world.server.frames import video_track
from holdover_world.server.hub import Hub
from holdover_world.server.protocol import (
    AckMessage,
    ActionMessage,
    ClientMessage,
    Detail,
    ErrorMessage,
    Hello,
    NewSession,
    ServerMessage,
    SessionInfo,
    SnapshotInfo,
    pack,
    parse,
)
from holdover_world.server.seats import Reader, RefusedError, Seat, StoredSnapshot

log = logging.getLogger("holdover_world.server")

#: A connection is closed after this many invalid messages.
MAX_MISTAKES = 32
#: Close codes: after too many invalid messages, and when the server shuts down.
MISBEHAVED, RESTARTING = 1008, 1012

_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

Id = Annotated[str, Path(pattern="^[0-9a-f]{16}$", description="The id from its creation.")]


def create_app(hub: Hub, access: Access) -> FastAPI:
    """The web application of a hub."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await hub.start()
        yield
        await hub.drain()

    app = FastAPI(
        title="Holdover", version=version("holdover-world"), lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Drive a world model, action by action. The video comes over a WebSocket, see `stream`.",
    )  # fmt: skip
    app.state = State({"hub": hub, "access": access})
    app.add_middleware(BodyLimit)
    _errors(app)
    _sessions(app, hub)
    _snapshots(app, hub)
    _stream(app, hub, access)
    _plumbing(app, hub)
    return app


async def _owner(request: Request, _: Annotated[Any, Depends(HTTPBearer(auto_error=False))]) -> str:
    access: Access = request.app.state.access
    return access.owner(request)


Owner = Annotated[str, Depends(_owner)]
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Detail, "description": "The body cannot be read."},
    401: {"model": Detail, "description": "There is no valid token."},
    403: {
        "model": Detail,
        "description": "A page of another site, or another host than localhost without tokens.",
    },
    413: {"model": Detail, "description": "The body is too long."},
    422: {"description": "The request is not valid."},
}
GONE: dict[int | str, dict[str, Any]] = {404: {"model": Detail, "description": "You have none of this id."}}
FULL: dict[int | str, dict[str, Any]] = {
    429: {"model": Detail, "description": "You have as many as one user may have."},
    503: {"model": Detail, "description": "The server is full, or shutting down."},
}


def _errors(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
        if error.status in (429, 503):
            headers["retry-after"] = "5"
        return plain(error.status, error.detail, **headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # The input is left out: what a client sent is not sent back.
        return plain(
            422, [{"loc": [str(at) for at in e["loc"]], "msg": e["msg"], "type": e["type"]} for e in error.errors()]
        )

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return plain(500, "the server failed; see its log")


def _sessions(app: FastAPI, hub: Hub) -> None:
    @app.post("/v1/sessions", status_code=201, responses=REFUSALS | FULL, tags=["sessions"])
    async def create(owner: Owner, new: NewSession) -> SessionInfo:
        """Begin a video in a new session."""
        return _session_info(hub, await hub.create(owner, new))

    @app.get("/v1/sessions", responses=REFUSALS, tags=["sessions"])
    async def list_sessions(owner: Owner) -> list[SessionInfo]:
        """Your sessions."""
        return [_session_info(hub, seat) for seat in hub.keeper.seats.values() if seat.owner == owner]

    @app.get("/v1/sessions/{id}", responses=REFUSALS | GONE, tags=["sessions"])
    async def show(owner: Owner, id: Id) -> SessionInfo:
        """One of your sessions."""
        return _session_info(hub, hub.seat(owner, id))

    @app.delete("/v1/sessions/{id}", status_code=204, responses=REFUSALS | GONE, tags=["sessions"])
    async def delete(owner: Owner, id: Id) -> None:
        """End a session and free its memory."""
        await hub.delete(owner, id)

    @app.post("/v1/sessions/{id}/fork", status_code=201, responses=REFUSALS | GONE | FULL, tags=["sessions"])
    async def fork(owner: Owner, id: Id) -> SessionInfo:
        """A new session that continues from the state of this one."""
        return _session_info(hub, await hub.fork(owner, id))

    @app.post("/v1/sessions/{id}/snapshots", status_code=201, responses=REFUSALS | GONE | FULL, tags=["snapshots"])
    async def snapshot(owner: Owner, id: Id) -> SnapshotInfo:
        """Save the state of a session."""
        return _snapshot_info(await hub.snapshot(owner, id))


def _snapshots(app: FastAPI, hub: Hub) -> None:
    @app.get("/v1/snapshots", responses=REFUSALS, tags=["snapshots"])
    async def list_snapshots(owner: Owner) -> list[SnapshotInfo]:
        """Your snapshots."""
        return [_snapshot_info(each) for each in hub.keeper.snapshots.values() if each.seat.owner == owner]

    @app.post("/v1/snapshots/{id}/restore", status_code=201, responses=REFUSALS | GONE | FULL, tags=["snapshots"])
    async def restore(owner: Owner, id: Id) -> SessionInfo:
        """A new session that continues from a snapshot."""
        return _session_info(hub, await hub.restore(owner, id))

    @app.delete("/v1/snapshots/{id}", status_code=204, responses=REFUSALS | GONE, tags=["snapshots"])
    async def delete_snapshot(owner: Owner, id: Id) -> None:
        """Delete a snapshot."""
        await hub.delete_snapshot(owner, id)


def _stream(app: FastAPI, hub: Hub, access: Access) -> None:
    protocol = {
        "subprotocol": SUBPROTOCOL,
        "encoding": "msgpack, one message per binary frame",
        "client": TypeAdapter(ClientMessage).json_schema(),
        "server": TypeAdapter(ServerMessage).json_schema(),
    }

    @app.get(
        "/v1/sessions/{id}/stream", status_code=426, tags=["stream"], openapi_extra={"x-websocket": protocol},
        responses=REFUSALS | GONE | {426: {"model": Detail, "description": "Open this as a WebSocket."}},
    )  # fmt: skip
    async def stream(owner: Owner, id: Id, after: Annotated[int | None, Query(ge=-1)] = None) -> Response:
        """The video, over a WebSocket. `x-websocket` describes its messages.

        Send actions and receive chunks; acknowledge each chunk. After a lost connection, connect again and give the
        newest chunk that you have as `after`: the server sends the chunks after it. A new connection closes the older.
        """
        hub.seat(owner, id)
        return plain(426, "open this URL as a WebSocket", upgrade="websocket", connection="Upgrade")

    @app.websocket("/v1/sessions/{id}/stream")
    async def socket(ws: WebSocket, id: str, after: str | None = None) -> None:
        try:
            owner = access.owner(ws)
            seat = hub.seat(owner, id)
            reader = hub.connect(seat, _after(after))
        except RefusedError as error:
            await ws.send_denial_response(plain(error.status, error.detail))
            return
        tasks: list[asyncio.Task[int]] = []
        try:
            await ws.accept(SUBPROTOCOL if SUBPROTOCOL in ws.scope.get("subprotocols", []) else None)
            tasks += [asyncio.create_task(talk(ws, hub, seat, reader)) for talk in (_send, _receive)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            code = next(iter(done)).result()
            with suppress(RuntimeError, WebSocketDisconnect):  # the client may be gone
                await ws.close(code)
        except WebSocketDisconnect:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            hub.disconnect(seat, reader)


async def _send(ws: WebSocket, hub: Hub, seat: Seat, reader: Reader) -> int:
    """Send waiting messages to the client; returns the code with which to close the connection."""
    config = hub.world.model.sizes
    hello = Hello(
        session=seat.id, resumes_at=seat.first, seq=seat.seq_seen, policy=seat.policy,
        policies=list(hub.world.policies), cameras={c.name: (c.width, c.height) for c in config.cameras}, fps=FPS,
        video={c.name: video_track(c.width, c.height) for c in config.cameras if seat.format == "mp4"},
        frames=config.frames_per_latent, action_dims=config.action_dims,
    )  # fmt: skip
    await ws.send_bytes(pack(hello))
    while True:
        await reader.wake.wait()
        reader.wake.clear()
        if reader.ended is not None:
            return reader.ended
        if hub.draining:
            return RESTARTING
        while reader.notes:
            await ws.send_bytes(pack(reader.notes.popleft()))
        for index, data in list(seat.outbox):
            if reader.sent < index < seat.published:
                await ws.send_bytes(data)
                reader.sent = index


async def _receive(ws: WebSocket, hub: Hub, seat: Seat, reader: Reader) -> int:
    """Handle the client's messages; returns the code with which to close the connection."""
    mistakes = 0
    while mistakes < MAX_MISTAKES:
        frame = await ws.receive()
        if frame["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(frame.get("code", 1000))
        if reader.ended is not None:
            return reader.ended
        try:
            data = frame.get("bytes")
            if data is None:
                raise ValueError("this is a text frame; send msgpack in binary frames")
            message = parse(data)
            if isinstance(message, ActionMessage):
                if (stale := hub.act(seat, message.seq, message.action, message.plan)) is not None:
                    reader.note(ErrorMessage(code="stale", detail=stale))
            elif isinstance(message, AckMessage):
                hub.acknowledge(seat, message.chunk)
            else:
                await hub.use(seat, message.policy)
        except (ValueError, RefusedError) as error:
            mistakes += 1
            reader.note(ErrorMessage(code="invalid", detail=str(error)))
    return MISBEHAVED


def _after(given: str | None) -> int | None:
    try:
        return None if given is None else int(given[:20])
    except ValueError:
        raise RefusedError(422, "after is not a whole number") from None


def _plumbing(app: FastAPI, hub: Hub) -> None:
    page = files("holdover_world.server") / "page"

    @app.get("/healthz", tags=["server"], responses={503: {"model": Detail, "description": "Shutting down."}})
    async def health() -> dict[str, str]:
        """Whether the server accepts new sessions."""
        if hub.draining:
            raise RefusedError(503, "the server is shutting down")
        return {"status": "ok"}

    @app.get("/metrics", tags=["server"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        hub.observe()
        return Response(hub.metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/scenarios", tags=["server"], responses=REFUSALS)
    async def scenarios(owner: Owner) -> dict[str, list[str]]:
        """The scenarios and policies that sessions can choose from."""
        return {"scenarios": list(hub.world.starts), "policies": list(hub.world.policies)}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return _file(page, "index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in ("drive.js", "msgpack.js", "drive.css"):
            raise HTTPException(404)
        return _file(page, name)


def _file(folder: Any, name: str) -> Response:
    content = (folder / name).read_text(encoding="utf-8")
    return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=_SECURITY)


def _session_info(hub: Hub, seat: Seat) -> SessionInfo:
    return SessionInfo(
        id=seat.id, scenario=seat.scenario, seed=seat.seed, policy=seat.policy, format=seat.format, mode=seat.mode,
        chunk=seat.chunk, seconds=seat.chunk * hub.period, connected=seat.reader is not None,
        parked=seat.session is None, bytes=seat.nbytes,
    )  # fmt: skip


def _snapshot_info(stored: StoredSnapshot) -> SnapshotInfo:
    return SnapshotInfo(id=stored.id, session=stored.seat.id, chunk=stored.seat.chunk, bytes=stored.nbytes)

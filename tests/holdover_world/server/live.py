"""A server on a real socket, in a thread of the test, and a client that speaks its protocol."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgpack
import uvicorn
from websockets.sync.client import ClientConnection, connect

from holdover_world.server.access import SUBPROTOCOL, Access
from holdover_world.server.app import create_app
from holdover_world.server.hub import Hub
from holdover_world.server.protocol import MAX_MESSAGE
from holdover_world.server.seats import Limits
from holdover_world.sessions.world import World
from tests.holdover_world.sessions.small import small_world


class Live:
    """A running server."""

    def __init__(self, hub: Hub, port: int, token: str | None) -> None:
        self.hub, self.address, self.token = hub, f"127.0.0.1:{port}", token
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self.http = httpx.Client(base_url=f"http://{self.address}", headers=headers, timeout=60)

    def create(self, **fields: Any) -> str:
        done = self.http.post("/v1/sessions", json={"format": "webp", **fields})
        assert done.status_code == 201, done.text
        return str(done.json()["id"])

    def info(self, id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/v1/sessions/{id}").json()
        return found

    def sessions(self) -> list[dict[str, Any]]:
        """All of them; unlike `info` this does not count as use."""
        found: list[dict[str, Any]] = self.http.get("/v1/sessions").json()
        return found

    def metrics(self) -> dict[str, float]:
        lines = [line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    @contextmanager
    def stream(self, id: str, query: str = "") -> Iterator[Stream]:
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        url = f"ws://{self.address}/v1/sessions/{id}/stream{query}"
        with connect(url, subprotocols=[SUBPROTOCOL], additional_headers=headers, max_size=None, open_timeout=60) as ws:
            yield Stream(ws)


class Stream:
    """One connection; the hello has been read."""

    def __init__(self, ws: ClientConnection) -> None:
        self.ws = ws
        self.hello = self.receive()
        assert self.hello["type"] == "hello"

    def send(self, **message: Any) -> None:
        self.ws.send(msgpack.packb(message))

    def receive(self, timeout: float = 60) -> dict[str, Any]:
        message: dict[str, Any] = msgpack.unpackb(self.ws.recv(timeout))
        return message

    def step(self, seq: int, action: list[float], *, ack: bool = True) -> dict[str, Any]:
        self.send(type="action", seq=seq, action=action)
        made = self.receive()
        assert made["type"] == "chunk", made
        if ack:
            self.send(type="ack", chunk=made["index"])
        return made


@contextmanager
def running(
    folder: Path, *, world: World | None = None, tokens: tuple[str, ...] = (), durable: bool = False, **limits: Any
) -> Iterator[Live]:
    hub = Hub(world or small_world(), limits=Limits(**limits), folder=folder, durable=durable)
    config = uvicorn.Config(
        create_app(hub, Access(tokens)), port=0, log_level="warning", ws="websockets-sansio", ws_max_size=MAX_MESSAGE,
        timeout_graceful_shutdown=10,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        live = Live(hub, server.servers[0].sockets[0].getsockname()[1], tokens[0] if tokens else None)
        with live.http:
            yield live
    finally:
        server.should_exit = True
        thread.join(60)

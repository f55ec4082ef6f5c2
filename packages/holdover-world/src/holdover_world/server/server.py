"""Running the server: its threads, its address and its log."""

from __future__ import annotations

import json
import logging
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import ParamSpec, TypeVar

import uvicorn

from holdover_world.server.access import Access, is_loopback
from holdover_world.server.app import create_app
from holdover_world.server.hub import Hub
from holdover_world.server.protocol import MAX_MESSAGE
from holdover_world.server.seats import Limits
from holdover_world.sessions.world import World

P = ParamSpec("P")
T = TypeVar("T")


class ThisThread(Executor):
    """An executor that works on the thread that calls `run`, until it is shut down. It then refuses new work."""

    def __init__(self) -> None:
        self._closed = False
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if self._closed:
            raise RuntimeError("the server is shutting down")
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._work.put(work)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True
        self._work.put(None)

    def run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class JsonLines(logging.Formatter):
    """One JSON object per line. The ``fields`` of a record are keys beside its message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def check_address(host: str, port: int, tokens: list[str] | None) -> None:
    """See whether a server may listen there, before anything is loaded.

    Raises:
        ValueError: other machines can reach the host and there are no tokens; or the port is none, or taken.
    """
    if not tokens and not is_loopback(host):
        raise ValueError(f"host={host!r} can be reached from other machines; give tokens (--tokens FILE)")
    if not 0 <= port < 2**16:
        raise ValueError(f"port={port} is not a port; give one from 0 to 65535, where 0 is any that is free")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(found[0]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except OSError as error:
        raise ValueError(f"cannot listen on host={host!r}, port={port}: {error.strerror}; give another") from error


def serve(
    world: World,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens: list[str] | None = None,
    limits: Limits | None = None,
    folder: Path,
    durable: bool = False,
) -> None:
    """Serve a world until SIGINT or SIGTERM. Then finish the chunk in flight and park the sessions.

    The world runs on the calling thread, which must be the main thread, and the web server on another. On any other
    thread the workers of OpenMP sleep between operations, and a chunk took twice as long on two cores.

    Args:
        world: the world.
        host, port: where to listen.
        tokens: the bearer tokens of users. They are required if other machines can reach the host.
        limits: the limits of users.
        folder: where sessions and snapshots are parked. Sessions that are there already continue.
        durable: write every session to disk after each chunk.

    Raises:
        ValueError: see `check_address`.
    """
    check_address(host, port, tokens)
    this = ThisThread()
    app = create_app(Hub(world, limits=limits, folder=folder, durable=durable, thread=this), Access(tokens or ()))
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("holdover_world.server", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, ws_max_size=MAX_MESSAGE, ws="websockets-sansio",
        timeout_graceful_shutdown=30, server_header=False,
    )  # fmt: skip
    server, ended = uvicorn.Server(config), list[BaseException]()

    def listen() -> None:
        try:
            server.run()
        except BaseException as error:  # also SystemExit, if the server cannot start
            ended.append(error)
        finally:
            this.shutdown()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    listening = Thread(target=listen, name="holdover-server")
    listening.start()
    this.run()
    listening.join()
    if ended:
        raise ended[0]

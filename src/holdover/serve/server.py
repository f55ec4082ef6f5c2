"""Running the server: where it listens, how it logs."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import uvicorn

from holdover.serve.access import Access, is_loopback
from holdover.serve.app import create_app
from holdover.serve.hub import Hub
from holdover.serve.protocol import MAX_MESSAGE
from holdover.serve.seats import Limits
from holdover.serve.world import World


class JsonLines(logging.Formatter):
    """One JSON object per line; what a record carries as ``fields`` stands beside its message."""

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
    """Serve a world until SIGINT or SIGTERM: then finish the generation in flight and park the sessions.

    Args:
        world: what is served.
        host, port: where to listen.
        tokens: who may use it; none are needed where only this machine reaches the server.
        limits: what users may take.
        folder: for parked sessions and snapshots; sessions found there are taken up again.
        durable: write every session after each generation.

    Raises:
        ValueError: other machines reach the host and there are no tokens.
    """
    if not tokens and not is_loopback(host):
        raise ValueError(f"host={host!r} is reached by others, and there are no tokens; give a file of tokens")
    app = create_app(Hub(world, limits=limits, folder=folder, durable=durable), Access(tokens or ()))
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("holdover.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, ws_max_size=MAX_MESSAGE, ws="websockets-sansio",
        timeout_graceful_shutdown=30, server_header=False,
    )  # fmt: skip
    uvicorn.Server(config).run()

"""Access control: bearer tokens, the origin of requests, and the size of bodies."""

from __future__ import annotations

import ipaddress
import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdover_world.server.seats import RefusedError, owner_of

#: The subprotocol of the stream. A browser cannot set headers on a WebSocket, so it sends its token as a second
#: subprotocol, ``bearer.<token>``.
SUBPROTOCOL = "holdover.v1"
_BEARER = "bearer."
MAX_BODY = 64 * 1024


class Access:
    """Maps a request to the owner of sessions.

    Args:
        tokens: one for each user; each has sessions of its own. Without tokens only this machine is served.

    Raises:
        ValueError: a token is too short or has characters that a header cannot carry.
    """

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        self._tokens = tuple(tokens)
        for token in self._tokens:
            if len(token) < 16 or not token.isascii() or any(c.isspace() or c in '",;' for c in token):
                raise ValueError("a token is short or has spaces, quotes or commas; give 16 or more plain characters")

    @property
    def open(self) -> bool:
        return not self._tokens

    def owner(self, connection: HTTPConnection) -> str:
        """The owner who sent a request.

        Raises:
            RefusedError: the request has no valid token, or comes from a web page of another site.
        """
        origin, host = connection.headers.get("origin"), connection.headers.get("host")
        if origin is not None and urlsplit(origin).netloc != host:
            raise RefusedError(403, "requests from web pages of other sites are refused")
        if self.open:
            if not is_loopback(urlsplit(f"//{host}").hostname or ""):
                raise RefusedError(403, "this server has no tokens, so it serves only requests to localhost")
            return "local"
        given = _token(connection)
        for token in self._tokens:
            if given is not None and secrets.compare_digest(given.encode(), token.encode()):
                return owner_of(token)
        raise RefusedError(401, "send a bearer token: Authorization: Bearer <token>")


def is_loopback(host: str) -> bool:
    """Whether a host name or address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_tokens(path: Path) -> list[str]:
    """The tokens of a file, one per line. Blank lines and ``#`` comments are skipped.

    Raises:
        ValueError: the file has no tokens.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise ValueError(f"{path} holds no token; write one per line, each of 16 characters or more")
    return tokens


def _token(connection: HTTPConnection) -> str | None:
    scheme, _, given = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    for protocol in connection.headers.get("sec-websocket-protocol", "").split(","):
        if protocol.strip().startswith(_BEARER):
            return protocol.strip()[len(_BEARER) :]
    return None


def plain(status: int, detail: object, **headers: str) -> Response:
    """A JSON response in ASCII, so that any text a client sent can be encoded."""
    return Response(json.dumps({"detail": detail}), status, headers, "application/json")


class BodyLimit:
    """Refuses requests with a body longer than `MAX_BODY` bytes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            if len(body) > MAX_BODY:
                refusal = plain(413, f"the body is longer than {MAX_BODY} bytes", connection="close")
                await refusal(scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)

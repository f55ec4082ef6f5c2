"""Who may use the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdover_world.server.access import Access, is_loopback, read_tokens
from holdover_world.server.server import serve
from tests.holdover_world.sessions.small import small_world


def test_other_machines_need_a_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"host='0\.0\.0\.0' can be reached from other machines"):
        serve(small_world(), host="0.0.0.0", folder=tmp_path)
    hosts = {"127.0.0.1": True, "::1": True, "localhost": True, "10.0.0.1": False, "localhost.evil.example": False}
    assert {host: is_loopback(host) for host in hosts} == hosts


def test_tokens_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="16 or more plain characters"):
        Access(["short"])
    tokens = tmp_path / "tokens"
    tokens.write_text("# ours\n\n0123456789abcdef\n")
    assert read_tokens(tokens) == ["0123456789abcdef"]
    tokens.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no token"):
        read_tokens(tokens)

"""`holdover serve`: its options arrive, and mistakes are one line."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="no FastAPI; pip install 'holdover-world[serve]'")
import holdover_world.cli.serve
import holdover_world.server.server
from holdover_world.server.seats import Limits
from holdover_world.sessions.world import World
from tests.holdover_world.cli.commands import refused, run

TOKEN = "0123456789abcdef"


def test_options_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        holdover_world.server.server, "serve", lambda world, **options: given.update(world=world, **options)
    )
    (tmp_path / "tokens").write_text(f"# ours\n\n{TOKEN}\n")
    arguments = [
        "--tokens",
        str(tmp_path / "tokens"),
        "--policy",
        "never",
        "--host",
        "0.0.0.0",
        "--port",
        "0",
        "--durable",
    ]
    result = run("serve", *arguments, "--sessions", "3", "--folder", str(tmp_path))
    assert result.exit_code == 0, result.output
    world = given.pop("world")
    assert isinstance(world, World)
    assert (list(world.policies), list(world.starts)) == (["never"], ["urban", "highway", "uturn"])
    assert given == {
        "host": "0.0.0.0", "port": 0, "tokens": [TOKEN], "limits": Limits(sessions=3), "folder": tmp_path,
        "durable": True,
    }  # fmt: skip


def test_mistakes_are_one_line_and_nothing_is_loaded_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdover_world.cli.serve, "load", None)
    (tokens := tmp_path / "tokens").write_text(TOKEN)
    assert "there is no policy 'turbo'" in refused("serve", "--policy", "turbo")
    assert "sessions=0" in refused("serve", "--sessions", "0")
    assert "No such file" in refused("serve", "--tokens", str(tmp_path / "none"))
    assert "tokens" in refused("serve", "--host", "0.0.0.0")
    assert "port=99999 is not a port" in refused("serve", "--port", "99999")
    assert "host='nowhere.invalid'" in refused("serve", "--host", "nowhere.invalid", "--tokens", str(tokens))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Address already in use" in refused("serve", "--port", str(taken.getsockname()[1]))

"""`holdover serve` and `holdover fleet`: what the options become, and mistakes in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import holdover_world.server.server
from holdover import cli
from holdover_world.server.access import Access, is_loopback, read_tokens
from holdover_world.server.seats import Limits
from holdover_world.server.server import serve
from holdover_world.sessions.world import World
from tests.holdover_world.sessions.small import small_world

TOKEN = "0123456789abcdef"


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    message: str = result.stderr
    return message


def test_options_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        holdover_world.server.server, "serve", lambda world, **options: given.update(world=world, **options)
    )
    (tmp_path / "tokens").write_text(f"# ours\n\n{TOKEN}\n")
    arguments = ["--tokens", str(tmp_path / "tokens"), "--policy", "never", "--host", "0.0.0.0", "--durable"]
    result = CliRunner().invoke(cli.app, ["serve", *arguments, "--sessions", "3", "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    world = given.pop("world")
    assert isinstance(world, World)
    assert (list(world.policies), list(world.starts)) == (["never"], ["urban", "highway", "uturn"])
    assert given == {
        "host": "0.0.0.0", "port": 8000, "tokens": [TOKEN], "limits": Limits(sessions=3), "folder": tmp_path,
        "durable": True,
    }  # fmt: skip


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    assert "there is no policy 'turbo'" in refused("serve", "--policy", "turbo")
    assert "sessions=0" in refused("serve", "--sessions", "0")
    assert "No such file" in refused("serve", "--tokens", str(tmp_path / "none"))
    assert "tokens" in refused("serve", "--host", "0.0.0.0")
    (tmp_path / "plan.yaml").write_text("scenarios: []")
    assert "give ['drivers'" in refused("fleet", "run", str(tmp_path / "plan.yaml"))


def test_others_need_a_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"host='0\.0\.0\.0' is reached by others"):
        serve(small_world(), host="0.0.0.0", folder=tmp_path)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "10.0.0.1", "localhost.evil.example")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="16 plain characters"):
        Access(["short"])
    (tmp_path / "tokens").write_text("# none\n")
    with pytest.raises(ValueError, match="holds no token"):
        read_tokens(tmp_path / "tokens")

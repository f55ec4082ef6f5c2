"""Running `holdover` in a test."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from holdover import cli


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def refused(*arguments: str) -> str:
    """Run a command that must fail. Returns the one line that it prints."""
    result = run(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert result.stderr.startswith("holdover: ")
    message: str = result.stderr
    return message

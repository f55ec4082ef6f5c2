"""Help is quick, and a missing extra is named."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import holdover_world.simulator.record
from tests.holdover_world.cli.commands import refused, run

HELP = """
import sys
from importlib.metadata import entry_points
found = {point.name: point.load() for point in entry_points(group="holdover.commands")}
assert {"demo", "fleet", "serve", "world"} <= found.keys(), found
heavy = "torch", "numpy", "diffusers", "av", "matplotlib", "pyarrow", "fastapi", "ray", "gymnasium"
print([name for name in heavy if name in sys.modules])
"""


def test_loading_the_commands_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    ["demo", "serve", "fleet run", "world record", "world train-autoencoder", "world train", "world eval"],
)
def test_every_command_has_help(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0, result.output
    assert command.split()[0] in run("--help").output


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("panda3d.core", "simulator"),
        ("direct.showbase", "simulator"),
        ("fastapi", "serve"),
        ("msgpack", "serve"),
        ("prometheus_client", "serve"),
        ("gymnasium", "env"),
        ("ray", "fleet"),
        ("yaml", "fleet"),
    ],
)
def test_a_missing_extra_is_named(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(holdover_world.simulator.record, "record", missing)
    message = refused("world", "record", "--scenario", "urban", "--out", "x")
    assert f"pip install 'holdover-world[{extra}]'" in message

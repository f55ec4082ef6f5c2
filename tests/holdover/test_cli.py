"""The command line: quick help, one-line errors, and commands of other packages."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import holdover
from holdover import cli
from holdover.cli import plugins
from holdover.extras import missing

OWN = ("methods", "models", "inspect", "calibrate", "overhead", "compare", "report", "trace")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def refused(*arguments: str) -> str:
    """Run what must fail; returns the one line it says."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("holdover: ")
    assert result.stderr.count("\n") == 1
    message: str = result.stderr
    return message


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option: str) -> None:
    """Nor do the commands of the packages that are installed here."""
    code = f"""
import sys
from typer.testing import CliRunner
from holdover import cli
result = CliRunner().invoke(cli.app, [{option!r}])
assert result.exit_code == 0 and result.output, result.output
heavy = "torch", "numpy", "pyarrow", "av", "matplotlib", "skimage", "jinja2", "holdover.engine", "holdover_world.model"
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").output == f"holdover {holdover.__version__}\n"


def test_every_command_has_help() -> None:
    listed = run("--help").output
    for command in OWN:
        assert f"\n  {command} " in listed
        result = run(command, "--help")
        assert result.exit_code == 0, command


def test_the_methods_are_those_of_the_registry_and_of_the_docs() -> None:
    table = run("methods", "--markdown").output.strip()
    assert [line.split("`")[1] for line in table.splitlines()[2:]] == holdover.policies()
    assert "tau_floor=0.97" in table
    assert table in (Path(__file__).parents[2] / "docs" / "methods.md").read_text()  # else put this one there
    assert "relative change (L1) of the timestep-modulated input" in run("methods", "teacache").output
    assert "did you mean 'teacache'" in refused("methods", "teacahe")
    wide = CliRunner().invoke(cli.app, ["methods"], env={"COLUMNS": "200"}).output
    assert wide.count("predictor: Residual()") == table.count("| `Residual()` |") >= 5


@pytest.mark.parametrize(
    ("module", "extra"),
    [("matplotlib.figure", "report"), ("av", "report"), ("skimage", "report"), ("diffusers", "diffusers")],
)
def test_a_missing_extra_is_named(module: str, extra: str) -> None:
    hint = missing(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert hint == f"{module.partition('.')[0]} is not installed: pip install 'holdover[{extra}]'"


def test_a_module_of_no_extra_is_named() -> None:
    assert missing(ModuleNotFoundError("No module named 'absent'", name="absent")) == "No module named 'absent'"
    assert "No module named 'absent'" in refused("inspect", "absent:factory")


def greet(name: str) -> None:
    """Say hello."""
    typer.echo(f"hello {name}")


tools = typer.Typer(help="Tools of another package.")
tools.command("greet")(greet)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points of other packages: a function, a group, two that cannot be imported, and a name that is taken."""
    here = "tests.holdover.test_cli"
    points = [
        EntryPoint(name, value, plugins.GROUP)
        for name, value in (
            ("greet", f"{here}:greet"),
            ("tools", f"{here}:tools"),
            ("broken", "tests.holdover.absent:app"),
            ("wrong", f"{here}:absent"),
            ("models", f"{here}:greet"),
        )
    ]

    def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == plugins.GROUP
        return [point for point in points if name in (None, point.name)]

    monkeypatch.setattr(plugins, "entry_points", entry_points)


@pytest.mark.usefixtures("others")
def test_commands_of_other_packages_work_as_their_own() -> None:
    listed = run("--help").output
    assert "  greet      Say hello.\n" in listed
    assert "  tools      Tools of another package.\n" in listed
    assert run("greet", "you").output == "hello you\n"
    assert run("tools", "greet", "you").output == "hello you\n"
    assert "Usage: " in run("tools", "--help").output
    assert "CogVideoX" in run("models").output  # the library's own comes first
    assert run("absent").exit_code == 2


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("arguments", [(), ("--help",), ("sub", "--option", "3")])
def test_a_command_that_cannot_be_imported_names_itself_and_nothing_else_breaks(arguments: tuple[str, ...]) -> None:
    assert "  broken     Cannot be imported; call it to see why.\n" in run("--help").output
    message = refused("broken", *arguments)
    assert "'broken'" in message
    assert "ModuleNotFoundError: No module named 'tests.holdover.absent'" in message
    assert "has no attribute 'absent'" in refused("wrong", *arguments)


def test_errors_of_the_library_are_one_line(tmp_path: Path) -> None:
    assert "holds no rollout" in refused("trace", str(tmp_path))
    assert "holds no rollout" in refused("report", str(tmp_path))
    for command in ("calibrate", "overhead", "compare"):
        assert "'tests.holdover' names no function; give package.module:function" in refused(command, "tests.holdover")

"""The command line. A command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from holdover.cli.known import inspect, methods, models
from holdover.cli.plugins import Commands
from holdover.cli.runs import report, trace
from holdover.cli.tune import calibrate, compare, overhead

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def show_version(wanted: bool) -> None:
    if wanted:
        from holdover import __version__

        typer.echo(f"holdover {__version__}")
        raise typer.Exit


@app.callback()
def describe(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Makes video world models fast without training them."""


for command in (methods, models, inspect, calibrate, overhead, compare, report, trace):
    app.command()(command)


def main() -> None:
    """The entry point of the ``holdover`` command."""
    app()

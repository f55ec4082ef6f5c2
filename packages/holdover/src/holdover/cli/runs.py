"""Recorded runs: `holdover report`, `holdover trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdover.cli.common import complain, plain_errors

RunDir = Annotated[Path, typer.Argument(help="The folder of a run, as holdover.report.record writes it.")]


def report(run_dir: RunDir) -> None:
    """Write the page of a run, index.html.

    The exit code is 1 if files of the run are damaged.
    """
    with plain_errors():
        from holdover.report.page import build_page

        page, problems = build_page(run_dir)
        typer.echo(f"page: {page}")
        complain(problems)


def trace(
    run_dir: RunDir,
    scenario: Annotated[str | None, typer.Option(help="Only this scenario.")] = None,
    rollout: Annotated[str | None, typer.Option(help="Only the rollout of this name.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Show every decision of this chunk.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write a .parquet or .csv table, or a .json trace for Perfetto.")
    ] = None,
) -> None:
    """Show what was computed, what was reused, and why.

    The exit code is 1 if files of the run are damaged.
    """
    with plain_errors():
        from rich.console import Console

        from holdover.report.run_read import read_run
        from holdover.report.trace import export, print_chunk, print_ribbons

        rollouts, problems = read_run(run_dir)
        chosen = [r for r in rollouts if scenario in (None, r.about.scenario) and rollout in (None, r.about.name)]
        if out is not None:
            export(chosen, out)
            typer.echo(f"trace: {out}")
        elif chunk is not None:
            print_chunk(chosen, chunk, Console())
        else:
            print_ribbons(chosen, Console())
        complain(problems)

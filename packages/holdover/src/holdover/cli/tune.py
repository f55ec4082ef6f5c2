"""A model of one's own: `holdover calibrate`, `holdover overhead`, `holdover compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from holdover.cli.common import plain_errors

Factory = Annotated[
    str,
    typer.Argument(
        help="package.module:function. The function returns a model and its loop; the loop is a function of the cache "
        "that runs some chunks and returns what it made."
    ),
]
Branch = Annotated[str, typer.Option(help="The guidance branch to measure.")]
Out = Annotated[Path | None, typer.Option(help="Write the figures to this file, as JSON.")]


def calibrate(
    factory: Factory,
    out: Annotated[Path, typer.Option(help="The file for what was measured, as JSON.")] = Path("calibration.json"),
    degree: Annotated[int, typer.Option(help="The degree of TeaCache's polynomial.")] = 4,
    branch: Branch = "",
) -> None:
    """Measure what TeaCache and MagCache must know of a model.

    Writes their options: TeaCache's polynomial and MagCache's ratios.
    """
    with plain_errors():
        from holdover.report.files import write_json
        from holdover.tune.calibrate import calibrate as run
        from holdover.tune.loop import from_factory

        figures = run(*from_factory(factory), degree=degree, branch=branch)
        write_json(out, figures)
        typer.echo(json.dumps(figures))


def overhead(
    factory: Factory,
    out: Out = None,
    rounds: Annotated[int, typer.Option(help="Runs of the loop under each policy.")] = 5,
) -> None:
    """Measure what a cache costs per pass of a model.

    Times the passes without a cache, with one that reuses nothing, and with one that reuses every block. Counts how
    often the host waits for the device, and the operators that the cache runs outside of the blocks.
    """
    with plain_errors():
        from holdover.report.progress import bar
        from holdover.report.tables import percent, print_table
        from holdover.tune.loop import from_factory
        from holdover.tune.overhead import ARMS, measure_overhead

        model, loop = from_factory(factory)
        with bar() as progress:
            task = progress.add_task("overhead", total=ARMS * (rounds + 1))
            figures = measure_overhead(model, loop, rounds=rounds, advance=lambda: progress.advance(task))
        rows = [
            (
                row["name"],
                f"{row['ms_per_pass']:.3f}",
                f"{100 * (row['ratio'] - 1):+.1f} %",
                percent(row["skip"]),
                _mebibytes(row["bytes_held"]),
                _number(row["syncs_per_pass"]),
                _number(row["launches_per_pass"]),
                "yes" if row["identical"] else "no",
            )
            for row in figures["rows"]
        ]
        columns = ("", "ms per pass", "against unattached", "skip", "MiB held", "syncs", "launches", "same bits")
        print_table(columns, rows)
        _write(out, figures)


def compare(
    factory: Factory,
    out: Out = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be given more than once.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed runs of the loop under each method.")] = 3,
    branch: Branch = "",
) -> None:
    """Compare the methods that fit a model and its loop.

    Shows skip rate, speed-up and relative error of each, beside the fixed schedule whose skip rate is nearest.
    """
    with plain_errors():
        from rich.progress import Progress, SpinnerColumn, TextColumn

        from holdover.report.tables import percent, print_table, scientific
        from holdover.tune.compare import compare_methods
        from holdover.tune.loop import from_factory

        model, loop = from_factory(factory)
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), transient=True) as progress:
            task = progress.add_task("", total=None)
            figures = compare_methods(
                model,
                loop,
                methods=method or (),
                rounds=rounds,
                branch=branch,
                report=lambda name: progress.update(task, description=name),
            )
        rows = []
        for row in figures["rows"]:
            control = row["control"] or {"name": "–", "skip": None, "speedup": None, "error": None}
            cells = [row["name"], control["name"]]
            for each in (row, control):
                speedup = "–" if each["speedup"] is None else f"{each['speedup']:.2f}×"
                cells += [percent(each["skip"]), speedup, scientific(each["error"])]
            rows.append((cells[0], *cells[2:5], cells[1], *cells[5:]))
        columns = ("method", "skip", "speed-up", "error", "fixed schedule", "skip", "speed-up", "error")
        print_table(columns, rows, text=("method", "fixed schedule"))
        if figures["noise"]:
            typer.echo(f"two runs without a cache differ by {scientific(figures['noise'])}")
        for name, why in figures["unfit"].items():
            typer.echo(f"{name} does not fit: {' '.join(why.split())}")
        _write(out, figures)


def _number(count: float | None) -> str:
    return "–" if count is None else f"{count:.1f}"


def _mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.1f}"


def _write(out: Path | None, figures: dict[str, Any]) -> None:
    if out is not None:
        from holdover.report.files import write_json

        write_json(out, figures)

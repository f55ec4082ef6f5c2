"""The command line. What a command needs is imported when it runs: help is quick, and a missing extra says its name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from holdover.cli.common import Clips, Model, Seed, complain, load, plain_errors, typer

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def describe() -> None:
    """Makes video world models fast without training them: what has barely changed is held over."""


@app.command()
def calibrate(
    factory: Annotated[
        str | None,
        typer.Argument(
            help="package.module:function, which returns a model and its loop: a function of the attached cache that "
            "runs some chunks. By default the world model."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The file for what was measured.")] = Path("calibration.json"),
    degree: Annotated[int, typer.Option(help="Of TeaCache's polynomial.")] = 4,
    branch: Annotated[str, typer.Option(help="The guidance branch to measure.")] = "",
    steps: Annotated[int, typer.Option(help="Of the world model, per chunk.")] = 35,
    chunks: Annotated[int, typer.Option(help="Of the world model.")] = 4,
    model: Model = None,
    clips: Clips = None,
    seed: Seed = 0,
) -> None:
    """Fit TeaCache's polynomial and measure MagCache's ratios, as options for these methods in JSON."""
    with plain_errors():
        from holdover.tune.calibrate import from_factory, run_calibration, world_loop

        if factory is not None:
            sys.path.insert(0, str(Path.cwd()))
            calibrated, loop = from_factory(factory)
        else:
            world_model, _ = load(model, steps)
            calibrated = world_model
            loop = world_loop(world_model, steps=steps, chunks=chunks, seed=seed, clips=clips)
        figures = run_calibration(calibrated, loop, out, degree=degree, branch=branch)
        typer.echo(json.dumps(figures))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this method and its options.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the documentation.")] = False,
) -> None:
    """List the caching methods and the parts they are made of."""
    with plain_errors():
        from rich.console import Console

        from holdover.report.methods import method_help, method_markdown, method_table

        if name is not None:
            typer.echo(method_help(name))
        elif markdown:
            typer.echo(method_markdown())
        else:
            Console().print(method_table())


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="What holdover demo or lab.record wrote.")],
) -> None:
    """Write a run's comparison page, index.html; exit code 1 if files of the run are damaged."""
    with plain_errors():
        from holdover.report.page import build_page

        page, problems = build_page(run_dir)
        typer.echo(f"page: {page}")
        complain(problems)


@app.command()
def trace(
    run_dir: Annotated[Path, typer.Argument(help="What holdover demo or lab.record wrote.")],
    scenario: Annotated[str | None, typer.Option(help="Only this scenario.")] = None,
    rollout: Annotated[str | None, typer.Option(help="Only the rollout of this name.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Show every decision of this chunk.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write a .parquet or .csv table, or a .json trace for Perfetto.")
    ] = None,
) -> None:
    """Show what was computed and what reused, block by block, and why; exit code 1 if files are damaged."""
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


@app.command()
def models() -> None:
    """List the models whose blocks are known, as the table of the documentation."""
    from holdover.models.registry import models_markdown

    typer.echo(models_markdown(), nl=False)


@app.command()
def inspect(
    target: Annotated[
        str, typer.Argument(help="module:factory, a function that returns a model, or it and arguments.")
    ],
    shape: Annotated[list[str] | None, typer.Option(help="An argument, random: name=1,16,3,32,32.")] = None,
) -> None:
    """Find the slots of a model that is not known yet: what to paste to attach to it."""
    with plain_errors():
        from holdover.methods.fixed_interval import fixed_interval
        from holdover.models.inspect import build, describe, examine, shapes

        policy = fixed_interval(over="steps", every=2, front_anchors=0, warmup=0, protection="pass")
        model, args, kwargs = build(target, shapes(shape or []))
        typer.echo(describe(model, examine(model, args, kwargs, policy)))


def main() -> None:
    """The entry point of the ``holdover`` command."""
    app()

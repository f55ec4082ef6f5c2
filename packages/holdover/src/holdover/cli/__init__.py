"""The command line. What a command needs is imported when it runs: help is quick, and a missing extra says its name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from holdover.cli.bench import bench
from holdover.cli.common import Clips, Model, Seed, complain, load, plain_errors, typer
from holdover.cli.world import world

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
fleet = typer.Typer(no_args_is_help=True, help="Evaluate many rollouts on a Ray cluster.")
app.add_typer(world, name="world")
app.add_typer(bench, name="bench")
app.add_typer(fleet, name="fleet")


@app.callback()
def describe() -> None:
    """Makes video world models fast without training them: what has barely changed is held over."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for the page, videos and report.")] = Path("runs/demo"),
    model: Model = None,
    clips: Clips = None,
    chunks: Annotated[
        int | None,
        typer.Option(help="Per scenario, a third of a second each. By default 60, or what is done in ten minutes."),
    ] = None,
    seed: Seed = 0,
    every: Annotated[int, typer.Option(help="SSIM and ST-LPIPS look at every so-manieth frame.")] = 20,
    scenario: Annotated[list[str] | None, typer.Option(help="Only these; may be given more than once.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="One piece per chunk, committed each time.")] = False,
) -> None:
    """Drive three scenarios with and without X-Cache; ends with a table, a page and its path."""
    with plain_errors():
        from holdover.report.progress import bar
        from holdover.report.tables import demo_table, print_whole
        from holdover_world.loop.scenarios import NAMES
        from holdover_world.measure.demo import DemoOptions, run_demo

        options = DemoOptions(
            scenarios=tuple(scenario) if scenario else NAMES,
            chunks=chunks,
            seed=seed,
            cadence="plain" if plain else "window",
            every=every,
        )
        loaded, path = load(model)
        with bar() as progress:
            report = run_demo(loaded, out, options, clips=clips, checkpoint=path, progress=progress)
        print_whole(demo_table(report))
        typer.echo(f"page: {out / 'index.html'}")


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
def serve(
    host: Annotated[str, typer.Option(help="Where to listen; other than localhost it takes --tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.")] = 8000,
    tokens: Annotated[Path | None, typer.Option(help="A file of bearer tokens, one a line.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="To offer, the first by default; may be repeated.")] = None,
    folder: Annotated[Path, typer.Option(help="For sessions nobody watches, and snapshots.")] = Path("runs/serve"),
    sessions: Annotated[int, typer.Option(help="At most, of all users.")] = 64,
    max_bytes: Annotated[int, typer.Option(help="Of sessions and snapshots in memory.")] = 4 * 2**30,
    durable: Annotated[bool, typer.Option(help="Write each session after every chunk.")] = False,
    model: Model = None,
) -> None:
    """Serve the world model: sessions over HTTP and WebSocket, and a page to drive on."""
    with plain_errors():
        import holdover
        from holdover_world.server.access import read_tokens
        from holdover_world.server.seats import Limits
        from holdover_world.server.server import serve as run
        from holdover_world.sessions.world import World, load_starts

        chosen = {name: holdover.policy(name) for name in policy} if policy else None
        limits = Limits(sessions=sessions, max_bytes=max_bytes)
        known = read_tokens(tokens) if tokens else None
        loaded = load(model)[0]
        world = World(loaded, load_starts(loaded), policies=chosen)
        run(world, host=host, port=port, tokens=known, limits=limits, folder=folder, durable=durable)


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


@fleet.command("run")
def fleet_run(
    plan: Annotated[Path, typer.Argument(help="A YAML file: scenarios, seeds, drivers, chunks.")],
    policy: Annotated[list[str] | None, typer.Option(help="May be repeated. By default xcache_reactive.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes on this machine, 1 by default.")] = None,
    out: Annotated[Path, typer.Option(help="The folder of the run; finished rollouts in it are kept.")] = Path(
        "runs/fleet"
    ),
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster, host:port. By default one is started.")] = None,
) -> None:
    """Drive every scenario, seed and driver of a plan under each policy; results come as Parquet."""
    with plain_errors():
        from functools import partial

        import holdover
        from holdover.report.progress import bar
        from holdover_world.env.drive_env import shipped_course
        from holdover_world.fleet import read_plan, run_fleet

        policies = tuple(policy or ["xcache_reactive"])
        for name in policies:
            holdover.policy(name)
        rollouts = read_plan(plan, policies)
        with bar() as progress:
            task = progress.add_task("fleet", total=len(rollouts))
            results = run_fleet(
                rollouts,
                out,
                workers=workers,
                course=partial(shipped_course, policies),
                address=address,
                progress=lambda done, _: progress.update(task, completed=done),
            )
        typer.echo(f"results: {results}")


def main() -> None:
    """The entry point of the ``holdover`` command."""
    app()

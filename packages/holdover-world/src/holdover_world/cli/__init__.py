"""The commands that this package adds to `holdover`: world, demo, serve and fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdover.cli.common import plain_errors
from holdover_world.cli.common import Clips, Model, Seed, load
from holdover_world.cli.world import world as world

fleet = typer.Typer(no_args_is_help=True, help="Evaluate many rollouts on a Ray cluster.")


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
        from holdover.report.tables import print_whole
        from holdover_world.loop.scenarios import NAMES
        from holdover_world.measure.demo import DemoOptions, run_demo
        from holdover_world.measure.tables import demo_table

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

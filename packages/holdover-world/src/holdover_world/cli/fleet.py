"""`holdover fleet`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdover.cli.common import plain_errors

fleet = typer.Typer(no_args_is_help=True, help="Evaluate many episodes on a Ray cluster.")


@fleet.command("run")
def run(
    plan: Annotated[Path, typer.Argument(help="A YAML file with the keys scenarios, seeds, drivers and chunks.")],
    policy: Annotated[
        list[str] | None, typer.Option(help="Drive under this policy. Can be repeated. Default: xcache_reactive.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes on this machine, 1 by default.")] = None,
    out: Annotated[Path, typer.Option(help="The folder of the run. Episodes finished there are kept.")] = Path(
        "runs/fleet"
    ),
    address: Annotated[
        str | None, typer.Option(help="host:port of a running Ray cluster. By default one is started.")
    ] = None,
) -> None:
    """Drive every scenario, seed and driver of a plan under each policy. Writes results.parquet."""
    with plain_errors():
        from functools import partial

        import holdover
        from holdover.report.progress import bar
        from holdover_world.env.drive_env import shipped_course
        from holdover_world.fleet import read_plan, run_fleet

        policies = tuple(policy or ["xcache_reactive"])
        for name in policies:
            holdover.policy(name)  # an unknown name fails here, before any worker starts
        episodes = read_plan(plan, policies)
        with bar() as progress:
            task = progress.add_task("fleet", total=len(episodes))
            results = run_fleet(
                episodes,
                out,
                workers=workers,
                course=partial(shipped_course, policies),
                address=address,
                progress=lambda done, _: progress.update(task, completed=done),
            )
        typer.echo(f"results: {results}")

"""`holdover demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdover.cli.common import plain_errors
from holdover_world.cli.common import Clips, Model, Seed, load


def demo(
    out: Annotated[Path, typer.Option(help="The folder for the page, the videos and the report.")] = Path("runs/demo"),
    model: Model = None,
    clips: Clips = None,
    chunks: Annotated[
        int | None,
        typer.Option(help="Chunks per scenario, 1/3 s each. By default 60, or what ten minutes allow."),
    ] = None,
    seed: Seed = 0,
    every: Annotated[int, typer.Option(help="Compute SSIM and ST-LPIPS on every n-th frame.")] = 20,
    scenario: Annotated[list[str] | None, typer.Option(help="Drive only this scenario. Can be repeated.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Use the plain cadence: commit every chunk.")] = False,
) -> None:
    """Drive three scenarios with and without X-Cache. Prints a table and writes a page."""
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

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
        typer.Option(help="Chunks of a drive, 1/3 s each. By default what six minutes allow, from 24 to 60."),
    ] = None,
    seed: Seed = 0,
    every: Annotated[
        int | None,
        typer.Option(help="Compute SSIM and ST-LPIPS on every n-th frame. By default one per chunk of short drives."),
    ] = None,
    scenario: Annotated[list[str] | None, typer.Option(help="Drive only this scenario. Can be repeated.")] = None,
    newest: Annotated[bool, typer.Option("--newest", help="No plan: the newest action is held.")] = False,
    steady: Annotated[bool, typer.Option("--steady", help="Hold one action throughout.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="With a plan, without, and steady.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Use the plain cadence: commit every chunk.")] = False,
) -> None:
    """Drive three scripts, with a plan that is always kept, with and without caches. Prints a table, writes a page."""
    with plain_errors():
        from holdover.report.progress import bar
        from holdover.report.tables import print_whole
        from holdover_world.measure.demo import SCRIPTED, DemoOptions, Told, run_demo
        from holdover_world.measure.tables import demo_table, result_lines

        asked: dict[Told, bool] = {"oracle": False, "newest": newest, "steady": steady}
        options = DemoOptions(
            scenarios=tuple(scenario) if scenario else SCRIPTED,
            told=tuple(told for told, wanted in asked.items() if wanted or everything) or ("oracle",),
            chunks=chunks,
            seed=seed,
            cadence="plain" if plain else "window",
            every=every,
        )
        loaded, path = load(model)
        with bar() as progress:
            report = run_demo(loaded, out, options, clips=clips, checkpoint=path, progress=progress)
        for line in result_lines(report):
            typer.echo(line)
        print_whole(demo_table(report))
        typer.echo(f"page: {out / 'index.html'}")

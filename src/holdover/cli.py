"""The command line. What a command needs is imported when it runs: help is quick, and a missing extra says its name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from holdover.world.transformer import WorldModel

try:
    import typer
except ModuleNotFoundError:  # the core installs without a command line
    sys.exit("holdover: the command line needs an extra: pip install 'holdover[world]'")

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
world = typer.Typer(no_args_is_help=True, help="Record clips and train world models.")
bench = typer.Typer(no_args_is_help=True, help="Measure: ablations, overhead, reactions.")
app.add_typer(world, name="world")
app.add_typer(bench, name="bench")

#: Which extra brings a module that may be missing.
_EXTRAS = {
    "av": "world",
    "pyarrow": "world",
    "rich": "world",
    "panda3d": "simulator",
    "direct": "simulator",
    "skimage": "report",
    "matplotlib": "report",
    "jinja2": "report",
}

Model = Annotated[Path | None, typer.Option(help="A checkpoint. By default the shipped one.")]
Clips = Annotated[Path | None, typer.Option(help="A folder of clips to start from. By default the shipped ones.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Benchmarks = Annotated[Path, typer.Option(help="The folder for the results.")]


@app.callback()
def describe() -> None:
    """Makes video world models fast without training them: what has barely changed is held over."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for the page, videos and report.")] = Path("runs/demo"),
    model: Model = None,
    clips: Clips = None,
    generations: Annotated[int, typer.Option(help="Per scenario, a third of a second each.")] = 60,
    seed: Seed = 0,
    every: Annotated[int, typer.Option(help="SSIM and ST-LPIPS look at every so-manieth frame.")] = 12,
    scenario: Annotated[list[str] | None, typer.Option(help="Only these; may be given more than once.")] = None,
) -> None:
    """Drive three scenarios with and without X-Cache; ends with a table, a page and its path."""
    with _plain_errors():
        from holdover.bench.demo import DemoOptions, run_demo
        from holdover.report.progress import bar
        from holdover.report.tables import demo_table, print_whole
        from holdover.rollout.scenarios import NAMES

        options = DemoOptions(
            scenarios=tuple(scenario) if scenario else NAMES, generations=generations, seed=seed, every=every
        )
        loaded, path = _load(model)
        with bar() as progress:
            report = run_demo(loaded, out, options, clips=clips, checkpoint=path, progress=progress)
        print_whole(demo_table(report))
        typer.echo(f"page: {out / 'index.html'}")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this method and its options.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the documentation.")] = False,
) -> None:
    """List the caching methods and the parts they are made of."""
    with _plain_errors():
        from rich.console import Console

        from holdover.report.methods import method_help, method_markdown, method_table

        if name is not None:
            typer.echo(method_help(name))
        elif markdown:
            typer.echo(method_markdown())
        else:
            Console().print(method_table())


@world.command()
def record(
    scenario: Annotated[str, typer.Option(help="urban, highway or uturn.")],
    out: Annotated[Path, typer.Option(help="The folder for the clips; finished ones are kept.")],
    clips: Annotated[int, typer.Option(help="How many.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the first clip; the others count on.")] = 0,
    frames: Annotated[int, typer.Option(help="Per clip, 12 a second.")] = 240,
    depth: Annotated[bool, typer.Option(help="Record depth as well.")] = True,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
) -> None:
    """Record clips of the scripted driver in the simulator."""
    with _plain_errors():
        from holdover.world.record import record as run

        run(scenario, clips, out, seed=seed, frames=frames, depth=depth, workers=workers)
        typer.echo(f"{clips} {scenario} clips in {out}")


@world.command()
def train(
    data: Annotated[Path, typer.Option(help="A folder of clips.")],
    out: Annotated[Path, typer.Option(help="The folder for weights, log and curve; an interrupted run goes on.")],
    heldout: Annotated[Path | None, typer.Option(help="Clips to validate on.")] = None,
    start_from: Annotated[Path | None, typer.Option(help="Checkpoint to begin with; default: random weights.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. By default the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(help="Clips per step. By default the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of data, noise and weights. By default the recipe's.")] = None,
    recipe: Annotated[str, typer.Option(help="base, or sharpen, which goes on from a base checkpoint.")] = "base",
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.")] = "cpu",
) -> None:
    """Train a world model, or continue; writes model.safetensors, log.jsonl and curve.png."""
    with _plain_errors():
        _keep_memory()
        from holdover.report.plots import plot_training
        from holdover.world.recipe import RECIPES
        from holdover.world.train import read_log
        from holdover.world.train import train as run

        if recipe not in RECIPES:
            raise ValueError(f"recipe {recipe!r} is not one of {', '.join(RECIPES)}")
        given = {"steps": steps, "batch": batch, "seed": seed}
        numbers = replace(RECIPES[recipe], **{name: value for name, value in given.items() if value is not None})
        weights = run(data, out, numbers, heldout=heldout, start_from=start_from, device=device)
        plot_training(out / "curve.png", list(read_log(out)))
        typer.echo(f"weights: {weights}\ncurve: {out / 'curve.png'}")


@bench.command()
def ablation(
    out: Benchmarks = Path("benchmarks"),
    model: Model = None,
    clips: Clips = None,
    generations: Annotated[int, typer.Option(help="Per scenario, a third of a second each.")] = 60,
    seed: Seed = 0,
    scenario: Annotated[list[str] | None, typer.Option(help="Only these; may be given more than once.")] = None,
) -> None:
    """X-Cache part by part, the cadence it needs, and the control of one piece per chunk."""
    with _plain_errors():
        from holdover.bench.ablation import SCENARIOS, run_ablation
        from holdover.report.progress import bar

        with bar() as progress:
            figures = run_ablation(
                _load(model)[0],
                out,
                generations=generations,
                scenarios=tuple(scenario) if scenario else SCENARIOS,
                seed=seed,
                clips=clips,
                progress=progress,
            )
        _show(out / "ablation.md", figures)


@bench.command()
def overhead(
    out: Benchmarks = Path("benchmarks"),
    model: Model = None,
    clips: Clips = None,
    generations: Annotated[int, typer.Option(help="To time, four of warm-up included.")] = 44,
    seed: Seed = 0,
) -> None:
    """What attaching costs where nothing is reused, and what is left where everything is."""
    with _plain_errors():
        from holdover.bench.overhead import run_overhead
        from holdover.report.progress import bar

        with bar() as progress:
            figures = run_overhead(
                _load(model)[0], out, generations=generations, seed=seed, clips=clips, progress=progress
            )
        _show(out / "overhead.md", figures)


@bench.command()
def reaction(
    out: Benchmarks = Path("benchmarks"),
    model: Model = None,
    clips: Clips = None,
    generations: Annotated[int, typer.Option(help="To drive in each scenario.")] = 28,
    moments: Annotated[int, typer.Option(help="In each scenario at which the events happen.")] = 4,
    seed: Seed = 0,
) -> None:
    """Brake, steer and change lane in mid-cycle: how much of it a cached rollout shows, and how late."""
    with _plain_errors():
        from holdover.bench.reactions import run_reactions
        from holdover.report.progress import bar

        with bar() as progress:
            figures = run_reactions(
                _load(model)[0],
                out,
                generations=generations,
                count=moments,
                seed=seed,
                clips=clips,
                progress=progress,
            )
        _show(out / "reaction.md", figures)


def main() -> None:
    """The entry point of the ``holdover`` command."""
    app()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        hint = f"{error.name} is not installed: pip install 'holdover[{extra}]'" if extra else str(error)
        _fail(hint)
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    typer.echo(f"holdover: {' '.join(message.split())}", err=True)
    raise typer.Exit(2) from None


def _show(card: Path, figures: dict[str, Any]) -> None:
    """Print a benchmark's card; its last line is JSON."""
    typer.echo(card.read_text(encoding="utf-8"))
    typer.echo(json.dumps(figures))


def _keep_memory() -> None:
    from holdover.world.runtime import keep_memory

    keep_memory()


def _load(path: Path | None) -> tuple[WorldModel, Path]:
    """The model at ``path``, or the shipped one."""
    _keep_memory()
    from holdover.rollout.scenarios import shipped_model
    from holdover.world.transformer import WorldModel

    path = path or shipped_model()
    return WorldModel.load(path), path


if __name__ == "__main__":
    main()

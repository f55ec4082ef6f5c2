"""The command line. What a command needs is imported when it runs: help is quick, and a missing extra says its name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
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
fleet = typer.Typer(no_args_is_help=True, help="Evaluate many rollouts on a Ray cluster.")
bench = typer.Typer(no_args_is_help=True, help="Measure: ablations, overhead, reactions.")
app.add_typer(world, name="world")
app.add_typer(bench, name="bench")
app.add_typer(fleet, name="fleet")

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
    "fastapi": "serve",
    "uvicorn": "serve",
    "websockets": "serve",
    "msgpack": "serve",
    "PIL": "serve",
    "prometheus_client": "serve",
    "gymnasium": "env",
    "ray": "fleet",
    "yaml": "fleet",
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
def calibrate(
    factory: Annotated[
        str | None,
        typer.Argument(
            help="package.module:function, which returns a model and its loop: a function of the attached cache that "
            "runs some generations. By default the world model."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The file for what was measured.")] = Path("calibration.json"),
    degree: Annotated[int, typer.Option(help="Of TeaCache's polynomial.")] = 4,
    branch: Annotated[str, typer.Option(help="The guidance branch to measure.")] = "",
    steps: Annotated[int, typer.Option(help="Of the world model, per generation.")] = 35,
    generations: Annotated[int, typer.Option(help="Of the world model.")] = 4,
    model: Model = None,
    clips: Clips = None,
    seed: Seed = 0,
) -> None:
    """Fit TeaCache's polynomial and measure MagCache's ratios, as options for these methods in JSON."""
    with _plain_errors():
        from holdover.bench.calibrate import from_factory, run_calibration, world_loop

        if factory is not None:
            sys.path.insert(0, str(Path.cwd()))
            calibrated, loop = from_factory(factory)
        else:
            world_model, _ = _load(model)
            calibrated = world_model
            loop = world_loop(world_model, steps=steps, generations=generations, seed=seed, clips=clips)
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
    durable: Annotated[bool, typer.Option(help="Write each session after every generation.")] = False,
    model: Model = None,
) -> None:
    """Serve the world model: sessions over HTTP and WebSocket, and a page to drive on."""
    with _plain_errors():
        import holdover
        from holdover.serve.access import read_tokens
        from holdover.serve.seats import Limits
        from holdover.serve.server import serve as run
        from holdover.serve.world import World, load_starts

        chosen = {name: holdover.policy(name) for name in policy} if policy else None
        limits = Limits(sessions=sessions, max_bytes=max_bytes)
        known = read_tokens(tokens) if tokens else None
        loaded = _load(model)[0]
        world = World(loaded, load_starts(loaded), policies=chosen)
        run(world, host=host, port=port, tokens=known, limits=limits, folder=folder, durable=durable)


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


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="What holdover demo or holdover.bench.record wrote.")],
) -> None:
    """Write a run's comparison page, index.html; exit code 1 if files of the run are damaged."""
    with _plain_errors():
        from holdover.report.page import build_page

        page, problems = build_page(run_dir)
        typer.echo(f"page: {page}")
        _complain(problems)


@app.command()
def trace(
    run_dir: Annotated[Path, typer.Argument(help="What holdover demo or holdover.bench.record wrote.")],
    scenario: Annotated[str | None, typer.Option(help="Only this scenario.")] = None,
    rollout: Annotated[str | None, typer.Option(help="Only the rollout of this name.")] = None,
    generation: Annotated[int | None, typer.Option(help="Show every decision of this generation.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write a .parquet or .csv table, or a .json trace for Perfetto.")
    ] = None,
) -> None:
    """Show what was computed and what reused, block by block, and why; exit code 1 if files are damaged."""
    with _plain_errors():
        from rich.console import Console

        from holdover.report.run_read import read_run
        from holdover.report.trace import export, print_generation, print_ribbons

        rollouts, problems = read_run(run_dir)
        chosen = [r for r in rollouts if scenario in (None, r.about.scenario) and rollout in (None, r.about.name)]
        if out is not None:
            export(chosen, out)
            typer.echo(f"trace: {out}")
        elif generation is not None:
            print_generation(chosen, generation, Console())
        else:
            print_ribbons(chosen, Console())
        _complain(problems)


@app.command()
def models() -> None:
    """List the models whose blocks are known, as the table of the documentation."""
    from holdover.hosts.registry import models_markdown

    typer.echo(models_markdown(), nl=False)


@app.command()
def inspect(
    target: Annotated[
        str, typer.Argument(help="module:factory, a function that returns a model, or it and arguments.")
    ],
    shape: Annotated[list[str] | None, typer.Option(help="An argument, random: name=1,16,3,32,32.")] = None,
) -> None:
    """Find the slots of a model that is not known yet: what to paste to attach to it."""
    with _plain_errors():
        from holdover.hosts.inspect import build, describe, examine, shapes
        from holdover.policies.fixed_interval import fixed_interval

        policy = fixed_interval(over="steps", every=2, front_anchors=0, warmup=0, protection="pass")
        model, args, kwargs = build(target, shapes(shape or []))
        typer.echo(describe(model, examine(model, args, kwargs, policy)))


@fleet.command("run")
def fleet_run(
    plan: Annotated[Path, typer.Argument(help="A YAML file: scenarios, seeds, drivers, generations.")],
    policy: Annotated[list[str] | None, typer.Option(help="May be repeated. By default xcache_reactive.")] = None,
    workers: Annotated[int, typer.Option(help="Processes, where the cluster is this machine.")] = 1,
    out: Annotated[Path, typer.Option(help="The folder of the run; finished rollouts in it are kept.")] = Path(
        "runs/fleet"
    ),
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. By default one is started here.")] = None,
) -> None:
    """Drive every scenario, seed and driver of a plan under each policy; results come as Parquet."""
    with _plain_errors():
        from functools import partial

        import holdover
        from holdover.report.progress import bar
        from holdover.serve.drive_env import shipped_course
        from holdover.serve.fleet import read_plan, run_fleet

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


@world.command("eval")
def evaluate(
    clips: Annotated[Path, typer.Option(help="Held-out clips to drive.")],
    data: Annotated[Path, typer.Option(help="Other clips, from which to learn to read motion back.")],
    out: Benchmarks = Path("benchmarks"),
    model: Model = None,
    per_scenario: Annotated[int, typer.Option(help="Clips of every scenario.")] = 2,
    generations: Annotated[int, typer.Option(help="To drive of each clip, at most.")] = 48,
    seed: Seed = 0,
) -> None:
    """The world model against the simulator: fidelity, drift, obedience, and whether its cameras agree."""
    with _plain_errors():
        _keep_memory()
        from holdover.bench.evaluate import run_evaluation
        from holdover.report.progress import bar

        with bar() as progress:
            figures = run_evaluation(
                _load(model)[0],
                out,
                clips=clips,
                data=data,
                per_scenario=per_scenario,
                generations=generations,
                seed=seed,
                progress=progress,
            )
        _show(out / "world.md", figures)


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
def scale(
    out: Benchmarks = Path("benchmarks"),
    size: Annotated[str, typer.Option(help="tiny, small, base or xworld-5b; the weights are random.")] = "small",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed cycles of every run.")] = 5,
    seed: Seed = 0,
) -> None:
    """DiT time under given shares of skipped blocks, at sizes up to X-World's, against the bound."""
    with _plain_errors():
        _keep_memory()
        from holdover.bench.scale import run_scale
        from holdover.report.progress import bar

        with bar() as progress:
            figures = run_scale(
                out, size=size, device=device, compiled=compiled, repeats=repeats, seed=seed, progress=progress
            )
        _show(out / f"{figures['name']}.md", figures)


@bench.command()
def hosts(
    out: Benchmarks = Path("benchmarks"),
    passes: Annotated[int, typer.Option(help="Of each model under each library, five of warm-up included.")] = 60,
    blocks: Annotated[int, typer.Option(help="Of each model; their weights are random.")] = 30,
) -> None:
    """FBCache beside diffusers' own hooks and cache-dit, on models of diffusers: what the machinery costs."""
    with _plain_errors():
        from holdover.bench.hosts import run_hosts
        from holdover.report.progress import bar

        with bar() as progress:
            figures = run_hosts(out, passes=passes, blocks=blocks, progress=progress)
        _show(out / "hosts.md", figures)


@bench.command("methods")
def bench_methods(
    out: Benchmarks = Path("benchmarks"),
    model: Model = None,
    clips: Clips = None,
    steps: Annotated[int, typer.Option(help="Denoising passes: 4, as trained, or many, such as 35.")] = 4,
    generations: Annotated[int | None, typer.Option(help="To drive. By default 12; of many steps 8.")] = None,
    seed: Seed = 0,
) -> None:
    """Every method at several settings, each beside the fixed interval that computes as many passes."""
    with _plain_errors():
        from holdover.bench.methods import run_methods
        from holdover.report.progress import bar

        with bar() as progress:
            figures = run_methods(
                _load(model)[0],
                out,
                steps=steps,
                generations=generations,
                seed=seed,
                clips=clips,
                progress=progress,
            )
        _show(out / f"methods-{steps}.md", figures)


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


def _complain(problems: Sequence[str]) -> None:
    """Name the damaged files of a run on stderr; the exit code is then 1."""
    for problem in problems:
        typer.echo(f"holdover: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


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

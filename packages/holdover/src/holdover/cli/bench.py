"""`holdover bench`: measurements, as cards and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from holdover.cli.common import Benchmarks, Clips, Model, Seed, keep_memory, load, plain_errors, show, typer

bench = typer.Typer(no_args_is_help=True, help="Measure: methods, ablations, overhead, reactions, scale.")


@bench.command()
def ablation(
    out: Benchmarks = Path("benchmarks"),
    model: Model = None,
    clips: Clips = None,
    chunks: Annotated[int, typer.Option(help="Per scenario, a third of a second each.")] = 60,
    seed: Seed = 0,
    scenario: Annotated[list[str] | None, typer.Option(help="Only these; may be given more than once.")] = None,
) -> None:
    """X-Cache part by part, the cadence it needs, and the control of one piece per chunk."""
    with plain_errors():
        from holdover.report.progress import bar
        from lab.ablation import SCENARIOS, run_ablation

        with bar() as progress:
            figures = run_ablation(
                load(model)[0],
                out,
                chunks=chunks,
                scenarios=tuple(scenario) if scenario else SCENARIOS,
                seed=seed,
                clips=clips,
                progress=progress,
            )
        show(out / "ablation.md", figures)


@bench.command()
def overhead(
    out: Benchmarks = Path("benchmarks"),
    model: Model = None,
    clips: Clips = None,
    chunks: Annotated[int, typer.Option(help="To time, four of warm-up included.")] = 44,
    seed: Seed = 0,
) -> None:
    """What attaching costs where nothing is reused, and what is left where everything is."""
    with plain_errors():
        from holdover.report.progress import bar
        from lab.overhead import run_overhead

        with bar() as progress:
            figures = run_overhead(load(model)[0], out, chunks=chunks, seed=seed, clips=clips, progress=progress)
        show(out / "overhead.md", figures)


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
    with plain_errors():
        keep_memory()
        from holdover.report.progress import bar
        from lab.scale import run_scale

        with bar() as progress:
            figures = run_scale(
                out, size=size, device=device, compiled=compiled, repeats=repeats, seed=seed, progress=progress
            )
        show(out / f"{figures['name']}.md", figures)


@bench.command()
def hosts(
    out: Benchmarks = Path("benchmarks"),
    passes: Annotated[int, typer.Option(help="Of each model under each library, five of warm-up included.")] = 60,
    blocks: Annotated[int, typer.Option(help="Of each model; their weights are random.")] = 30,
) -> None:
    """FBCache beside diffusers' own hooks and cache-dit, on models of diffusers: what the machinery costs."""
    with plain_errors():
        from holdover.report.progress import bar
        from lab.hosts import run_hosts

        with bar() as progress:
            figures = run_hosts(out, passes=passes, blocks=blocks, progress=progress)
        show(out / "hosts.md", figures)


@bench.command("methods")
def bench_methods(
    out: Benchmarks = Path("benchmarks"),
    model: Model = None,
    clips: Clips = None,
    steps: Annotated[int, typer.Option(help="Denoising passes: 4, as trained, or many, such as 35.")] = 4,
    chunks: Annotated[int | None, typer.Option(help="To drive. By default 12; of many steps 8.")] = None,
    seed: Seed = 0,
) -> None:
    """Every method at several settings, each beside the fixed interval that computes as many passes."""
    with plain_errors():
        from holdover.report.progress import bar
        from lab.methods import run_methods

        with bar() as progress:
            figures = run_methods(
                load(model, steps)[0],
                out,
                steps=steps,
                chunks=chunks,
                seed=seed,
                clips=clips,
                progress=progress,
            )
        show(out / f"methods-{steps}.md", figures)


@bench.command()
def reaction(
    out: Benchmarks = Path("benchmarks"),
    model: Model = None,
    clips: Clips = None,
    chunks: Annotated[int, typer.Option(help="To drive in each scenario.")] = 28,
    moments: Annotated[int, typer.Option(help="In each scenario at which the events happen.")] = 4,
    seed: Seed = 0,
) -> None:
    """Brake, steer and change lane in mid-cycle: how much of it a cached rollout shows, and how late."""
    with plain_errors():
        from holdover.report.progress import bar
        from lab.reactions import run_reactions

        with bar() as progress:
            figures = run_reactions(
                load(model)[0],
                out,
                chunks=chunks,
                count=moments,
                seed=seed,
                clips=clips,
                progress=progress,
            )
        show(out / "reaction.md", figures)

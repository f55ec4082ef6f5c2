"""`holdover world`: record clips, train and evaluate world models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from holdover.cli.common import plain_errors
from holdover_world.cli.common import Model, Seed, keep_memory, load, show

if TYPE_CHECKING:
    from holdover_world.training.trainer import Schedule

S = TypeVar("S", bound="Schedule")
T = TypeVar("T")

world = typer.Typer(no_args_is_help=True, help="Record clips, train and evaluate world models.")


@world.command()
def record(
    scenario: Annotated[str, typer.Option(help="urban, highway, uturn or straight (a highway without bends).")],
    out: Annotated[Path, typer.Option(help="The folder for the clips. Clips finished there are kept.")],
    clips: Annotated[int, typer.Option(help="The number of clips.")] = 200,
    seed: Annotated[int, typer.Option(help="The seed of the first clip. The others count up from it.")] = 0,
    frames: Annotated[int, typer.Option(help="Frames per clip, 12 per second.")] = 240,
    depth: Annotated[bool, typer.Option(help="Also record depth.")] = True,
    workers: Annotated[int, typer.Option(help="The number of processes.")] = 1,
) -> None:
    """Record clips of a scripted driver in the simulator."""
    with plain_errors():
        from holdover_world.simulator.record import record as run

        run(scenario, clips, out, seed=seed, frames=frames, depth=depth, workers=workers)
        typer.echo(f"{clips} {scenario} clips in {out}")


@world.command()
def train_autoencoder(
    data: Annotated[Path, typer.Option(help="A folder of clips to train on.")],
    out: Annotated[Path, typer.Option(help="The folder of the autoencoders. An interrupted run continues.")],
    modality: Annotated[str, typer.Option(help="The modality: colour or depth.")] = "colour",
    size: Annotated[str, typer.Option(help="The size: tiny or small.")] = "small",
    start_from: Annotated[
        Path | None, typer.Option(help="A trained autoencoder of colour, to train a deeper decoder for its latents.")
    ] = None,
    heldout: Annotated[Path | None, typer.Option(help="A folder of clips to validate on.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. By default those of the recipe.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Videos per camera and step. By default those of the recipe.")
    ] = None,
    device: Annotated[str, typer.Option(help="The device to train on: cpu or cuda.")] = "cpu",
) -> None:
    """Train the autoencoder of one modality, or continue. Writes it to a folder of that name in OUT, with curve.png."""
    with plain_errors():
        keep_memory()
        from holdover_world.measure.plots import plot_training
        from holdover_world.training.recipes import AUTOENCODERS
        from holdover_world.training.train_autoencoder import train_autoencoder as run
        from holdover_world.training.trainer import read_log

        recipes = _named(AUTOENCODERS, size, "size")
        stages = {"colour": recipes["decoder" if start_from else "colour"], "depth": recipes["depth"]}
        schedule, config = _named(stages, modality, "modality")
        weights = run(
            data,
            out / modality,
            _with(schedule, steps=steps, batch=batch),
            heldout=heldout,
            depth=modality == "depth",
            config=config,
            start_from=start_from,
            device=device,
        )
        plot_training(weights / "curve.png", list(read_log(weights)))
        typer.echo(f"weights: {weights}\ncurve: {weights / 'curve.png'}")


@world.command()
def train(
    data: Annotated[Path, typer.Option(help="A folder of clips to train on.")],
    out: Annotated[Path, typer.Option(help="The folder for weights, log and curve. An interrupted run continues.")],
    autoencoders: Annotated[
        Path | None,
        typer.Option(help="A folder that train-autoencoder wrote. Default: those of the checkpoint, or the installed."),
    ] = None,
    size: Annotated[str, typer.Option(help="The size: tiny, small, base or xworld-5b.")] = "small",
    recipe: Annotated[
        str | None,
        typer.Option(help="The stage: teacher, long, student, roads or agree. Default: student with --teacher."),
    ] = None,
    camera: Annotated[
        list[str] | None, typer.Option(help="Train on this camera. Can be repeated. Default: all.")
    ] = None,
    depth: Annotated[bool, typer.Option(help="Generate depth as well as colour.")] = True,
    heldout: Annotated[Path | None, typer.Option(help="A folder of clips to validate on.")] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="A checkpoint to begin with. Default: the teacher, or none.")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="A checkpoint to distil into a student of four steps.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. By default those of the recipe.")] = None,
    batch: Annotated[int | None, typer.Option(help="Clips per step. By default those of the recipe.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="The seed of data, noise and weights. By default that of the recipe.")
    ] = None,
    device: Annotated[str, typer.Option(help="The device to train on: cpu or cuda.")] = "cpu",
) -> None:
    """Train a world model, or continue. Writes the model, log.jsonl and curve.png."""
    with plain_errors():
        keep_memory()
        from holdover_world.codec.latents import Codec
        from holdover_world.config import CONFIGS, config_for
        from holdover_world.loop.scenarios import shipped_model
        from holdover_world.measure.plots import plot_training
        from holdover_world.training.recipes import RECIPES
        from holdover_world.training.train import train as run
        from holdover_world.training.trainer import read_log

        _named(CONFIGS, size, "size")
        sizes = config_for(size, data, cameras=camera, depth=depth)
        codec = Codec.load(autoencoders or teacher or start_from or shipped_model(), sizes)
        recipes = RECIPES.get(size, RECIPES["small"])
        numbers = _named(recipes, recipe or ("student" if teacher else "teacher"), "recipe")
        weights = run(
            data,
            out,
            _with(numbers, steps=steps, batch=batch, seed=seed),
            codec=codec,
            heldout=heldout,
            start_from=start_from,
            teacher=teacher,
            device=device,
        )
        plot_training(out / "curve.png", list(read_log(out)))
        typer.echo(f"weights: {weights}\ncurve: {out / 'curve.png'}")


@world.command()
def mix(
    first: Annotated[Path, typer.Argument(help="A checkpoint.")],
    second: Annotated[Path, typer.Argument(help="Another of the same sizes and autoencoders.")],
    out: Annotated[Path, typer.Option(help="The folder for the result.")],
    share: Annotated[float, typer.Option(help="The share of SECOND, between 0 and 1.")] = 0.5,
    since: Annotated[
        Path | None, typer.Option(help="Add to FIRST what SECOND learned since this checkpoint, instead of a mean.")
    ] = None,
    as_difference: Annotated[
        bool, typer.Option("--as-difference", help="Write the difference from the checkpoint in the folder above OUT.")
    ] = False,
) -> None:
    """Write the weighted mean of two checkpoints."""
    with plain_errors():
        from holdover_world.training.mix import mix as run

        run(first, second, share, out, since=since, as_difference=as_difference)
        typer.echo(f"weights: {out}")


def _named(found: Mapping[str, T], name: str, what: str) -> T:
    """The entry of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in found:
        raise ValueError(f"{what} {name!r} is not one of {', '.join(found)}")
    return found[name]


def _with(schedule: S, **given: int | None) -> S:
    """A schedule with the values that were given."""
    return replace(schedule, **{name: value for name, value in given.items() if value is not None})


@world.command("eval")
def evaluate(
    clips: Annotated[Path, typer.Option(help="A folder of held-out clips to drive.")],
    data: Annotated[Path, typer.Option(help="A folder of other clips, to train the network that reads motion.")],
    out: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("runs/eval"),
    model: Model = None,
    per_scenario: Annotated[int, typer.Option(help="Clips per scenario.")] = 2,
    chunks: Annotated[int, typer.Option(help="Chunks per clip, at most.")] = 66,
    steps: Annotated[int, typer.Option(help="Denoising steps per chunk.")] = 4,
    guidance: Annotated[float, typer.Option(help="Guidance on the action; 1 is none.")] = 1.0,
    reader_steps: Annotated[int, typer.Option(help="Training steps of the network that reads motion.")] = 1600,
    seed: Seed = 0,
) -> None:
    """Compare a world model with the simulator. Measures fidelity, drift, response to actions, agreement of cameras."""
    with plain_errors():
        keep_memory()
        from holdover.report.progress import bar
        from holdover_world.measure.evaluate import card_name, run_evaluation

        with bar() as progress:
            figures = run_evaluation(
                load(model, steps)[0],
                out,
                clips=clips,
                data=data,
                per_scenario=per_scenario,
                chunks=chunks,
                steps=steps,
                guidance=guidance,
                reader_steps=reader_steps,
                seed=seed,
                progress=progress,
            )
        show(out / f"{card_name(steps, guidance)}.md", figures)

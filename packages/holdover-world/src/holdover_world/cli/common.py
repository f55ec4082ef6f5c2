"""What these commands share: options, and how a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from holdover_world.model.transformer import WorldModel

Model = Annotated[Path | None, typer.Option(help="A checkpoint. By default the shipped one.")]
Clips = Annotated[Path | None, typer.Option(help="A folder of clips to start from. By default the shipped ones.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Benchmarks = Annotated[Path, typer.Option(help="The folder for the results.")]


def show(card: Path, figures: dict[str, Any]) -> None:
    """Print a benchmark's card; its last line is JSON."""
    typer.echo(card.read_text(encoding="utf-8"))
    typer.echo(json.dumps(figures))


def keep_memory() -> None:
    from holdover_world.runtime import keep_memory

    keep_memory()


def load(path: Path | None, steps: int = 4) -> tuple[WorldModel, Path]:
    """The model at ``path``, or the shipped one for so many steps."""
    keep_memory()
    from holdover_world.loop.scenarios import shipped_model
    from holdover_world.model.transformer import WorldModel

    path = path or shipped_model(steps)
    return WorldModel.load(path), path

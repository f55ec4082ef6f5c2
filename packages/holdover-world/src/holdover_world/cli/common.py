"""What these commands share: options, and loading a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from holdover_world.model.transformer import WorldModel

Model = Annotated[Path | None, typer.Option(help="A checkpoint folder. By default the installed one.")]
Clips = Annotated[Path | None, typer.Option(help="A folder of clips to start from. By default the installed ones.")]
Seed = Annotated[int, typer.Option(help="The seed of the noise.")]


def show(card: Path, figures: dict[str, Any]) -> None:
    """Print a card of results. The last line is its figures as JSON."""
    typer.echo(card.read_text(encoding="utf-8"))
    typer.echo(json.dumps(figures))


def keep_memory() -> None:
    """`holdover_world.runtime.keep_memory`, imported late."""
    from holdover_world.runtime import keep_memory

    keep_memory()


def load(path: Path | None, steps: int = 4) -> tuple[WorldModel, Path]:
    """The model of a checkpoint, by default the installed one for ``steps`` denoising steps, and its path."""
    keep_memory()
    from holdover_world.loop.scenarios import shipped_model
    from holdover_world.model.transformer import WorldModel

    path = path or shipped_model(steps)
    return WorldModel.load(path), path

"""What the commands share: options, and how mistakes are reported."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from holdover_world.model.transformer import WorldModel

try:
    import typer as typer  # for the other commands, too
except ModuleNotFoundError:  # the core installs without a command line
    sys.exit("holdover: the command line needs an extra: pip install 'holdover[world]'")

#: Which extra brings a module that may be missing.
EXTRAS = {
    "av": "world",
    "diffusers": "world",
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


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        hint = f"{error.name} is not installed: pip install 'holdover[{extra}]'" if extra else str(error)
        fail(hint)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))


def fail(message: str) -> None:
    typer.echo(f"holdover: {' '.join(message.split())}", err=True)
    raise typer.Exit(2) from None


def complain(problems: Sequence[str]) -> None:
    """Name the damaged files of a run on stderr; the exit code is then 1."""
    for problem in problems:
        typer.echo(f"holdover: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


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

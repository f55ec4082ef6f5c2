"""What the commands share: how mistakes are reported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import typer

from holdover.extras import missing


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what a user can fix into one line on stderr and exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(missing(error))
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with code 2."""
    typer.echo(f"holdover: {' '.join(message.split())}", err=True)
    raise typer.Exit(2) from None


def complain(problems: Sequence[str]) -> None:
    """Name the damaged files of a run on stderr; the exit code is then 1."""
    for problem in problems:
        typer.echo(f"holdover: {problem}", err=True)
    if problems:
        raise typer.Exit(1)

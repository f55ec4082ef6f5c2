"""What the scripts of the lab share: options, and measurements that can be continued."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from holdover.engine.blocks import find_blocks
from holdover.engine.snapshot import model_digest
from holdover.report.environment import environment
from holdover.report.files import write_json
from holdover_world.model.transformer import WorldModel

T = TypeVar("T")

#: The folder of the scripts and their cards.
LAB = Path(__file__).parent
Out = Annotated[Path, typer.Option(help="The folder for the results.")]


def run_script(main: Callable[..., None]) -> None:
    """Run ``main`` as a command; what the user can correct is one line on stderr."""
    try:
        typer.run(main)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")


class Parts:
    """The finished parts of a long measurement. A run that was interrupted continues from them.

    They are in ``out/.name-parts.json`` until the card is written. They are measured again if anything that they depend
    on has changed: the machine, the weights, or ``settings``.
    """

    def __init__(self, out: Path, name: str, model: WorldModel, **settings: Any) -> None:
        self._path = out / f".{name}-parts.json"
        self._settings = {
            **settings,
            "environment": environment(model),
            "weights": model_digest(find_blocks(model, [model])),
        }
        self._found: dict[str, Any] = {}
        if self._path.is_file():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["settings"] == self._settings:
                self._found = kept["parts"]

    def get(self, name: str, measure: Callable[[], T]) -> T:
        """The part of this name, in plain JSON values: read from the file, or measured and written to it."""
        if name not in self._found:
            self._found[name] = measure()
            write_json(self._path, {"settings": self._settings, "parts": self._found})
        part: T = self._found[name]
        return part

    def clear(self) -> None:
        """Delete the file. Call it when the card is written."""
        self._path.unlink(missing_ok=True)

"""Writing files so that they are either complete or absent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``. It is renamed to ``path`` when the block ends without an error.

    Creates the folder. The temporary path has the same suffix, by which writers tell the format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON that any parser reads. Infinities and NaN are errors."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

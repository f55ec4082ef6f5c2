"""Reading the folder of a run: every whole file is read, every damaged or missing one is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from holdover.decision import Decision
from holdover.report.canvas import Canvas
from holdover.report.run_dir import FORMAT, SUMS, ChunkRecord, Rollout, chunks_of, decisions_of, digest

_parquet: Any = pyarrow.parquet
_Content = TypeVar("_Content")

_SUM = re.compile(r"([0-9a-f]{64})  ([^/\n]+)\n")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A rollout as read from its folder. A part that is damaged or was never written is None.

    Attributes:
        about: what ran.
        frames: how many.
        video, difference: whether these files are whole.
        errors: per camera and "stitched", the mean squared error of each frame ``[T]``, in units of 1/255.
    """

    about: Rollout
    folder: Path
    frames: int
    canvas: Canvas
    video: bool
    difference: bool
    decisions: tuple[Decision, ...] | None
    chunks: tuple[ChunkRecord, ...] | None
    errors: Mapping[str, NDArray[np.float64]] | None


def read_run(run_dir: Path) -> tuple[list[Recorded], list[str]]:
    """Every rollout of a run that can be read, in the order of recording, and a line on each file that cannot.

    Raises:
        FileNotFoundError: the folder holds no rollout.
    """
    named = ("rollout.json", "video.mp4", "chunks.parquet", SUMS)
    folders = sorted({path.parent for name in named for path in run_dir.glob(f"*/*/{name}")})
    if not folders:
        raise FileNotFoundError(f"{run_dir} holds no rollout; holdover.report.record writes one")
    problems: list[str] = []
    found = [_Folder(folder, run_dir, problems).read() for folder in folders]
    rollouts = sorted((r for r in found if r is not None), key=lambda r: r.about.recorded)
    scenarios = list(dict.fromkeys(r.about.scenario for r in rollouts))
    return sorted(rollouts, key=lambda r: scenarios.index(r.about.scenario)), problems


class _Folder:
    """A rollout's folder; a line is added to ``problems`` for each file that is missing or damaged."""

    def __init__(self, path: Path, run_dir: Path, problems: list[str]) -> None:
        self._path, self._shown, self._problems = path, path.relative_to(run_dir), problems
        self._sums: dict[str, str] = {}

    def read(self) -> Recorded | None:
        sums = self._path / SUMS
        if not sums.is_file():
            self._report(SUMS, "is missing: the rollout was not recorded to its end")
            return None
        text = sums.read_bytes().decode(errors="replace")
        self._sums = {name: value for value, name in _SUM.findall(text)}
        if _SUM.sub("", text) or "rollout.json" not in self._sums:
            self._report(SUMS, "is damaged: it is not what sha256sum writes")
            return None
        about = self._file("rollout.json", _about)
        if about is None:
            return None
        rollout, frames, canvas, files = about
        for name in files:
            if name not in self._sums:
                self._report(SUMS, f"is damaged: it does not name {name}")
        return Recorded(
            about=rollout,
            folder=self._path,
            frames=frames,
            canvas=canvas,
            video=self._file("video.mp4", Path.is_file) or False,
            difference=self._file("difference.mp4", Path.is_file) or False,
            decisions=self._file("decisions.parquet", lambda path: tuple(decisions_of(_parquet.read_table(path)))),
            chunks=self._file("chunks.parquet", lambda path: tuple(chunks_of(_parquet.read_table(path)))),
            errors=self._file("frames.parquet", _errors),
        )

    def _file(self, name: str, how: Callable[[Path], _Content]) -> _Content | None:
        """A file's content; None where it was never written, is missing or damaged."""
        path = self._path / name
        if name not in self._sums:
            return None
        if not path.is_file():
            self._report(name, "is missing")
        elif digest(path) != self._sums[name]:
            self._report(name, f"is damaged: it is not the file that {SUMS} beside it was written for")
        else:
            try:
                return how(path)
            except (ValueError, KeyError, TypeError, AttributeError):
                self._report(
                    name, f"is whole, but not what this version writes (format {FORMAT}); record the run again"
                )
        return None

    def _report(self, name: str, what: str) -> None:
        self._problems.append(f"{self._shown / name} {what}")


def _about(path: Path) -> tuple[Rollout, int, Canvas, list[str]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
        raise ValueError(content["format"])
    rects = {name: (left, top, width, height) for name, (left, top, width, height) in content["rects"].items()}
    # A field that an earlier version did not write has its default; the others are required.
    rollout = Rollout(**{field.name: content[field.name] for field in fields(Rollout) if field.name in content})
    canvas = Canvas(width=content["width"], height=content["height"], rects=rects)
    return rollout, content["frames"], canvas, content["files"]


def _errors(path: Path) -> dict[str, NDArray[np.float64]]:
    return {name: np.array(values, float) for name, values in _parquet.read_table(path).to_pydict().items()}

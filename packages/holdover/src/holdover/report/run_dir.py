"""The folder of a run: `holdover.report.record` and the world's demo write it, the page and the trace read it.

RUN_DIR/<scenario>/<rollout>/
  rollout.json          what ran and its figures: the fields of `Rollout`, and where each camera lies on the canvas
  video.mp4             all cameras on one canvas, as generated
  difference.mp4        |rollout - reference|, mean of red, green and blue, times `GAIN`; if it has a reference
  decisions.parquet     one row per block of a pass, as `Decision`, each score a column score_<name>; if it has a cache
  chunks.parquet        one row per chunk, as `ChunkRecord`
  frames.parquet        one row per frame: mean squared error against the reference, in units of 1/255, per camera
                        and "stitched"; if it has a reference
  SHA256SUMS            of these files, as sha256sum -c reads them; written last
RUN_DIR/report.json     the demo's figures for other programs
RUN_DIR/index.html, plots/      what `holdover report` makes of it
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from holdover.decision import Decision
from holdover.report.canvas import Rows
from holdover.report.files import whole

# Typed loosely: pyarrow ships no types.
_arrow: Any = pyarrow
_parquet: Any = pyarrow.parquet

FORMAT = 2
GAIN = 8
SUMS = "SHA256SUMS"
SCORE = "score_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

Frames = Mapping[str, NDArray[np.uint8]]  # per camera [T, height, width, 3]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One rollout of a scenario.

    Attributes:
        scenario, name: names of its folders: letters, digits, dot, dash, plus, underscore.
        fps: frames per second.
        policy: what decided; None for full compute.
        reference: the rollout of the same scenario that it is compared with; None for a reference itself.
        block_share: the share of the reference's time that the skippable blocks take; None if not measured.
        pass_share: the share that whole denoising passes take, these blocks included; None if not measured.
        figures: what the table shows, keys as those of a policy in ``report.json``; empty to leave it out of the table.
        published: figures that others published for this scenario, as text per column of the table, and their
            ``source``; they are a row of their own.
        rows: the names of the cameras in each row of the canvas, from the top; None for a square grid.
        command, seed, environment: how to run it again, and what it ran on.
        recorded: seconds since the epoch; rollouts are shown in this order.

    Raises:
        ValueError: a field is out of range.
    """

    scenario: str
    name: str
    fps: float
    policy: str | None = None
    reference: str | None = None
    block_share: float | None = None
    pass_share: float | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, str] = field(default_factory=dict)
    rows: Rows | None = None
    command: str = ""
    seed: int | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    recorded: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        for kind in ("scenario", "name", "reference"):
            value = getattr(self, kind)
            if value is not None and not _NAME.fullmatch(value):
                raise ValueError(
                    f"{kind}={value!r} names a folder; use letters, digits, dot, dash, plus and underscore"
                )
        if self.reference == self.name:
            raise ValueError(f"rollout {self.name!r} is its own reference; compare it with another")
        for share in ("block_share", "pass_share"):
            value = getattr(self, share)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{share}={value} is a share, between 0 and 1")
        if self.pass_share is not None and (self.block_share is None or self.pass_share < self.block_share):
            raise ValueError(f"pass_share={self.pass_share} includes block_share={self.block_share}; give both")


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """One chunk.

    Attributes:
        chunk: its number in the decisions.
        frames: how many it emitted.
        seconds: that it took, all in all.
        dit_seconds: of these, in the transformer; None if not measured.
        bytes_held: by the cache afterwards; None without one.
        action: that was in force; None if there was none.
    """

    chunk: int
    frames: int
    seconds: float
    dit_seconds: float | None = None
    bytes_held: int | None = None
    action: tuple[float, ...] | None = None


def remove_rollouts(run_dir: Path, scenario: str) -> None:
    """Remove every finished rollout of a scenario, and nothing else."""
    for sums in run_dir.glob(f"{scenario}/*/{SUMS}"):
        shutil.rmtree(sums.parent)


def chunk_table(chunks: Sequence[ChunkRecord]) -> Any:
    """The pyarrow table of chunks."""
    columns = {f.name: [getattr(chunk, f.name) for chunk in chunks] for f in fields(ChunkRecord)}
    columns["action"] = [None if chunk.action is None else list(chunk.action) for chunk in chunks]
    return _arrow.table(columns)


def chunks_of(table: Any) -> list[ChunkRecord]:
    """The reverse of `chunk_table`."""
    return [
        ChunkRecord(**{**row, "action": None if row["action"] is None else tuple(row["action"])})
        for row in table.to_pylist()
    ]


def decision_table(decisions: Sequence[Decision]) -> Any:
    """The pyarrow table of decisions; a score that a decision does not have is null."""
    plain = [f.name for f in fields(Decision) if f.name != "scores"]
    names = sorted({name for decision in decisions for name in decision.scores})
    columns = {name: [getattr(decision, name) for decision in decisions] for name in plain}
    return _arrow.table(columns | {SCORE + n: [decision.scores.get(n) for decision in decisions] for n in names})


def decisions_of(table: Any) -> list[Decision]:
    """The reverse of `decision_table`."""
    found = []
    for row in table.to_pylist():
        scores = {key.removeprefix(SCORE): row.pop(key) for key in list(row) if key.startswith(SCORE)}
        found.append(Decision(**row, scores={name: value for name, value in scores.items() if value is not None}))
    return found


def write_table(path: Path, table: Any) -> None:
    """Write a pyarrow table as Parquet."""
    with whole(path) as partial:
        _parquet.write_table(table, partial, compression="zstd")


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

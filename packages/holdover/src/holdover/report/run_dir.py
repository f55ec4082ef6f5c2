"""The folder of a run: the demo and `lab.record` write it, the page and the trace read it.

RUN_DIR/<scenario>/<rollout>/
  rollout.json          what ran and its figures: the fields of `Rollout`
  video.mp4             all cameras on one canvas, as generated
  difference.mp4        |rollout - reference|, mean of red, green and blue, times `GAIN`; if it has a reference
  decisions.parquet     one row per block of a pass, as `Decision`, each score a column score_<name>; if it has a cache
  chunks.parquet   one row per chunk, as `ChunkRecord`
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from holdover.decision import Decision
from holdover.report.canvas import Canvas, arrange
from holdover.report.files import whole, write_json, write_text
from holdover.report.video import write_video

# Typed loosely: pyarrow ships no types.
_arrow: Any = pyarrow
_parquet: Any = pyarrow.parquet

FORMAT = 1
GAIN = 8
_DIFFERENCE_CRF = 24  # what coding loses here is `GAIN` times less in the difference
STITCHED = "stitched"
SUMS = "SHA256SUMS"
SCORE = "score_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Frames = Mapping[str, NDArray[np.uint8]]  # per camera [T, height, width, 3]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One rollout of a scenario.

    Attributes:
        scenario, name: names of its folders: letters, digits, dot, dash, underscore.
        fps: frames per second.
        policy: what decided; None for full compute.
        reference: the rollout of the same scenario that it is compared with; None for a reference itself.
        block_share: of the reference's time, what the blocks that may be skipped take; None if not measured.
        figures: what the table shows, keys as those of a policy in ``report.json``; empty to leave it out of the table.
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
    figures: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    seed: int | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    recorded: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        for kind in ("scenario", "name", "reference"):
            value = getattr(self, kind)
            if value is not None and not _NAME.fullmatch(value):
                raise ValueError(f"{kind}={value!r} names a folder; use letters, digits, dot, dash and underscore")
        if self.reference == self.name:
            raise ValueError(f"rollout {self.name!r} is its own reference; compare it with another")
        if self.block_share is not None and not 0 <= self.block_share <= 1:
            raise ValueError(f"block_share={self.block_share} is a share, between 0 and 1")


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


def write_rollout(
    run_dir: Path,
    rollout: Rollout,
    frames: Frames,
    *,
    chunks: Sequence[ChunkRecord],
    decisions: Sequence[Decision] = (),
    reference: Frames | None = None,
) -> Path:
    """Write one rollout; an earlier one of its name is replaced.

    Args:
        frames, reference: of the rollout, and of the rollout that ``rollout.reference`` names; may be memory maps.

    Returns:
        Its folder.

    Raises:
        ValueError: the frames are none, differ from the reference's in cameras, sizes or length, or are not those of
            the chunks.
    """
    canvas, count = _measure(frames)
    if (rollout.reference is None) != (reference is None):
        raise ValueError(f"reference={rollout.reference!r}: give its name and its frames, or neither")
    if reference is not None:
        require_comparable(rollout, frames, reference)
    if sum(chunk.frames for chunk in chunks) != count:
        raise ValueError(f"{len(chunks)} chunks do not add up to {count} frames")
    folder = run_dir / rollout.scenario / rollout.name
    (folder / SUMS).unlink(missing_ok=True)
    files = ["video.mp4", "chunks.parquet"]
    pictures = (canvas.compose({name: video[t] for name, video in frames.items()}) for t in range(count))
    write_video(folder / "video.mp4", pictures, fps=rollout.fps)
    if reference is not None:
        errors: dict[str, list[float]] = {name: [] for name in (*frames, STITCHED)}
        differences = _differences(frames, reference, canvas, errors)
        write_video(folder / "difference.mp4", differences, fps=rollout.fps, crf=_DIFFERENCE_CRF)
        write_table(folder / "frames.parquet", _arrow.table(errors))
        files += ["difference.mp4", "frames.parquet"]
    if rollout.policy is not None:
        write_table(folder / "decisions.parquet", decision_table(decisions))
        files.append("decisions.parquet")
    columns = {f.name: [getattr(g, f.name) for g in chunks] for f in fields(ChunkRecord)}
    columns["action"] = [None if g.action is None else list(g.action) for g in chunks]
    write_table(folder / "chunks.parquet", _arrow.table(columns))
    shape = {"frames": count, **asdict(canvas), "files": files}
    write_json(folder / "rollout.json", {"format": FORMAT, **asdict(rollout), **shape})
    write_text(folder / SUMS, "".join(f"{digest(folder / name)}  {name}\n" for name in ["rollout.json", *files]))
    return folder


def remove_rollouts(run_dir: Path, scenario: str) -> None:
    """Remove every finished rollout of a scenario, and nothing else."""
    for sums in run_dir.glob(f"{scenario}/*/{SUMS}"):
        shutil.rmtree(sums.parent)


def require_comparable(rollout: Rollout, frames: Frames, reference: Frames) -> None:
    """Raise a ValueError where a rollout's frames and its reference's differ in cameras, sizes or length."""
    own, other = ({name: video.shape for name, video in of.items()} for of in (frames, reference))
    if own != other:
        raise ValueError(f"rollout {rollout.name!r} has frames {own}, its reference {rollout.reference!r} {other}")


def decision_table(decisions: Sequence[Decision]) -> Any:
    """The pyarrow table of decisions; a score that a decision does not have is null."""
    plain = [f.name for f in fields(Decision) if f.name != "scores"]
    names = sorted({name for decision in decisions for name in decision.scores})
    columns = {name: [getattr(decision, name) for decision in decisions] for name in plain}
    return _arrow.table(columns | {SCORE + n: [decision.scores.get(n) for decision in decisions] for n in names})


def decisions_of(table: Any) -> list[Decision]:
    """`decision_table` undone."""
    found = []
    for row in table.to_pylist():
        scores = {key.removeprefix(SCORE): row.pop(key) for key in list(row) if key.startswith(SCORE)}
        found.append(Decision(**row, scores={name: value for name, value in scores.items() if value is not None}))
    return found


def write_table(path: Path, table: Any) -> None:
    """Write a pyarrow table as Parquet."""
    with whole(path) as partial:
        _parquet.write_table(table, partial, compression="zstd")


def _measure(frames: Frames) -> tuple[Canvas, int]:
    """The canvas of a rollout's cameras, and its number of frames."""
    if not frames or any(v.ndim != 4 or v.shape[3] != 3 or v.dtype != np.uint8 or not v.size for v in frames.values()):
        shapes = {name: (video.shape, str(video.dtype)) for name, video in frames.items()}
        raise ValueError(f"frames {shapes} are no videos; give uint8 [T, height, width, 3] per camera")
    lengths = {name: len(video) for name, video in frames.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the cameras differ in length: {lengths}")
    canvas = arrange({name: (video.shape[2], video.shape[1]) for name, video in frames.items()})
    return canvas, next(iter(lengths.values()))


def _differences(
    frames: Frames, reference: Frames, canvas: Canvas, errors: dict[str, list[float]]
) -> Iterator[NDArray[np.uint8]]:
    """The pictures of ``difference.mp4``; fills in the mean squared errors on the way."""
    pixels = {name: video.shape[1] * video.shape[2] for name, video in frames.items()}
    for t in range(len(next(iter(frames.values())))):
        pictures = {}
        for name, video in frames.items():
            difference = np.abs(video[t].astype(np.int16) - reference[name][t])
            errors[name].append(float(np.square(difference, dtype=np.int32).mean()))
            enlarged = np.rint(difference.mean(-1) * GAIN).clip(0, 255).astype(np.uint8)
            pictures[name] = np.repeat(enlarged[..., None], 3, -1)
        total = sum(errors[name][t] * size for name, size in pixels.items())
        errors[STITCHED].append(total / sum(pixels.values()))
        yield canvas.compose(pictures)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Writing one rollout into the folder of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from holdover.decision import Decision
from holdover.report.canvas import Canvas, Rows, arrange
from holdover.report.fidelity import STITCHED
from holdover.report.files import write_json, write_text
from holdover.report.run_dir import (
    FORMAT,
    GAIN,
    SUMS,
    ChunkRecord,
    Frames,
    Rollout,
    chunk_table,
    decision_table,
    digest,
    write_table,
)
from holdover.report.video import write_video

_arrow: Any = pyarrow

_DIFFERENCE_CRF = 24  # what coding loses here is `GAIN` times less in the difference


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
        run_dir: the folder of the run.
        rollout: what ran.
        frames: of the rollout; may be memory maps.
        chunks: of the rollout; their frames add up to ``frames``.
        decisions: of its cache.
        reference: the frames of the rollout that ``rollout.reference`` names.

    Returns:
        The folder of the rollout.

    Raises:
        ValueError: there are no frames, they differ from the reference's in cameras, sizes or length, or they do not
            add up to those of the chunks.
    """
    canvas, count = _measure(frames, rollout.rows)
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
    write_table(folder / "chunks.parquet", chunk_table(chunks))
    shape = {"frames": count, **asdict(canvas), "files": files}
    write_json(folder / "rollout.json", {"format": FORMAT, **asdict(rollout), **shape})
    write_text(folder / SUMS, "".join(f"{digest(folder / name)}  {name}\n" for name in ["rollout.json", *files]))
    return folder


def require_comparable(rollout: Rollout, frames: Frames, reference: Frames) -> None:
    """Raise a ValueError where a rollout's frames and its reference's differ in cameras, sizes or length."""
    own, other = ({name: video.shape for name, video in of.items()} for of in (frames, reference))
    if own != other:
        raise ValueError(f"rollout {rollout.name!r} has frames {own}, its reference {rollout.reference!r} {other}")


def _measure(frames: Frames, rows: Rows | None) -> tuple[Canvas, int]:
    """The canvas of a rollout's cameras, and its number of frames."""
    if not frames or any(v.ndim != 4 or v.shape[3] != 3 or v.dtype != np.uint8 or not v.size for v in frames.values()):
        shapes = {name: (video.shape, str(video.dtype)) for name, video in frames.items()}
        raise ValueError(f"frames {shapes} are no videos; give uint8 [T, height, width, 3] per camera")
    lengths = {name: len(video) for name, video in frames.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the cameras differ in length: {lengths}")
    canvas = arrange({name: (video.shape[2], video.shape[1]) for name, video in frames.items()}, rows)
    return canvas, next(iter(lengths.values()))


def _differences(
    frames: Frames, reference: Frames, canvas: Canvas, errors: dict[str, list[float]]
) -> Iterator[NDArray[np.uint8]]:
    """The pictures of ``difference.mp4``. Appends each frame's mean squared errors to ``errors``."""
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

"""Recording your own loop, for `holdover report` and `holdover trace`."""

from __future__ import annotations

import shlex
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from time import perf_counter
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from holdover.decision import Decision
from holdover.engine.cache import Cache
from holdover.report.bound import amdahl_bound, saved
from holdover.report.canvas import Rows, arrange
from holdover.report.decisions import skip_rate
from holdover.report.environment import environment
from holdover.report.fidelity import STITCHED, psnr, squared_errors, ssim
from holdover.report.run_dir import ChunkRecord, Frames, Rollout
from holdover.report.run_write import require_comparable, write_rollout
from holdover.report.video import frame_rate
from holdover.step import ActionLike, Step

#: SSIM is slow: it looks at one frame in this many.
EVERY = 12
_SMALLEST = 11  # pixels, the window of SSIM


def command_line() -> str:
    """The command that this process was started with, without the folder of the program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def record(
    run_dir: Path | str,
    scenario: str,
    name: str,
    *,
    fps: float,
    cache: Cache | None = None,
    stream: str = "default",
    reference: Recording | None = None,
    block_share: float | None = None,
    rows: Rows | None = None,
    seed: int | None = None,
) -> Recording:
    """Record a rollout of any model, for `holdover report` and `holdover trace`.

        with holdover.report.record("runs/mine", "kitchen", "full", fps=16) as full:
            for action in actions:
                full.add(generate(action), action=action)
        with holdover.attach(model, holdover.xcache(), slots=...) as cache:
            with holdover.report.record("runs/mine", "kitchen", "xcache", fps=16, cache=cache, reference=full) as run:
                for action in actions:
                    run.add(generate(action), action=action)

    Args:
        run_dir: the folder of the run; rollouts of other names stay in it.
        scenario, name: of the rollout. Rollouts of one scenario stand side by side on the page.
        fps: frames per second of the video.
        cache: what `holdover.attach` returned; None for full compute.
        stream: which of the cache's streams this is.
        reference: the finished recording of full compute with the same seed, noise and actions.
        block_share: the share of the reference's time that the skippable blocks take, for the bound; None if unknown.
        rows: the names of the cameras in each row of the picture, from the top; None for a square grid.
        seed: of the noise; shown on the page.

    Raises:
        ValueError: a name, the frame rate or the share is out of range, or the reference is of another scenario.
    """
    frame_rate(fps)
    if reference is not None and reference.rollout.scenario != scenario:
        raise ValueError(f"the reference is of scenario {reference.rollout.scenario!r}, not {scenario!r}")
    rollout = Rollout(
        scenario=scenario,
        name=name,
        fps=fps,
        policy=repr(cache) if cache is not None else None,
        reference=reference.rollout.name if reference else None,
        block_share=block_share,
        rows=rows,
        command=command_line(),
        seed=seed,
        environment=environment(),
    )
    return Recording(Path(run_dir), rollout, cache=cache, stream=stream, reference=reference)


@dataclass(slots=True)
class _Reel:
    """One camera's frames so far, in a temporary file."""

    file: IO[bytes]
    shape: tuple[int, ...]
    count: int = 0

    def frames(self) -> NDArray[np.uint8]:
        self.file.flush()
        return np.memmap(self.file, np.uint8, "r", shape=(self.count, *self.shape))


class Recording:
    """A rollout being recorded, as `record` returns it. The end of its ``with`` block writes the rollout, unless an
    error ended it.

    Frames wait in temporary files, so that long videos do not fill the memory. A finished recording keeps them, for the
    recordings that it is the reference of.
    """

    def __init__(
        self, run_dir: Path, rollout: Rollout, *, cache: Cache | None, stream: str, reference: Recording | None
    ) -> None:
        self.rollout, self.chunks = rollout, list[ChunkRecord]()
        self._run_dir, self._cache, self._stream, self._reference = run_dir, cache, stream, reference
        self._reels: dict[str, _Reel] = {}
        self._decisions: list[Decision] = []
        self._seen = cache.trace.dropped + len(cache.trace) if cache else 0
        self._left = perf_counter()

    def __enter__(self) -> Recording:
        self._left = perf_counter()
        return self

    def add(self, frames: Frames, *, action: ActionLike = None, seconds: float | None = None) -> None:
        """Note one chunk.

        Args:
            frames: what it emitted, per camera ``uint8 [T, height, width, 3]``, on the CPU.
            action: the action in force, as given to ``cache.step``.
            seconds: the time it took. None for the time since the last `add`, which is right for a loop that does
                nothing else. Give it where several rollouts take turns.

        Raises:
            ValueError: the frames are no videos, or of other cameras or sizes than before; the trace was cleared.
        """
        took = perf_counter() - self._left if seconds is None else seconds
        count = self._keep(frames)
        decided = self._new_decisions()
        # Where several chunks are denoised together, the oldest one is emitted.
        chunk = min((d.chunk for d in decided if d.role == "denoise"), default=len(self.chunks))
        if any(chunk == record.chunk for record in self.chunks):
            raise ValueError(f"two chunks are chunk {chunk}; give every chunk its own number: cache.step(chunk=...)")
        self._decisions += decided
        self.chunks.append(
            ChunkRecord(
                chunk=chunk,
                frames=count,
                seconds=took,
                bytes_held=self._cache.stats(self._stream).bytes_held if self._cache else None,
                action=Step(chunk=0, action=action).action_vector,
            )
        )
        self._left = perf_counter()

    def video(self) -> Frames:
        """Per camera all frames so far ``uint8 [T, height, width, 3]``, read-only."""
        return {name: reel.frames() for name, reel in self._reels.items()}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            return
        if not self.chunks:
            raise ValueError(f"recording {self.rollout.name!r} has no chunk; call add(frames) in the loop")
        self._decisions += self._new_decisions()  # a KV update may follow the last frames
        frames, reference = self.video(), self._reference.video() if self._reference else None
        if reference is not None:
            require_comparable(self.rollout, frames, reference)
        write_rollout(
            self._run_dir,
            replace(self.rollout, figures=self._figures(frames, reference)),
            frames,
            chunks=self.chunks,
            decisions=self._decisions,
            reference=reference,
        )

    def _keep(self, frames: Frames) -> int:
        """Append the frames to the reels; returns how many there were."""
        lengths = {len(video) for video in frames.values()}
        if len(lengths) != 1 or any(v.ndim != 4 or v.shape[3] != 3 or v.dtype != np.uint8 for v in frames.values()):
            raise ValueError("frames are no videos; give uint8 [T, height, width, 3] per camera, of one length")
        for name, video in frames.items():
            if not self.chunks and min(video.shape[1:3]) < _SMALLEST:
                raise ValueError(f"camera {name!r} is smaller than {_SMALLEST} pixels, the window of SSIM")
            if not self.chunks:
                file = tempfile.TemporaryFile()  # noqa: SIM115
                weakref.finalize(self, file.close)
                self._reels[name] = _Reel(file, video.shape[1:])
        known = {name: reel.shape for name, reel in self._reels.items()}
        if {name: video.shape[1:] for name, video in frames.items()} != known:
            raise ValueError(f"the cameras of this recording are {known}; give the same in every chunk")
        for name, video in frames.items():
            self._reels[name].file.write(np.ascontiguousarray(video).data)
            self._reels[name].count += len(video)
        return lengths.pop()

    def _new_decisions(self) -> list[Decision]:
        if self._cache is None:
            return []
        trace = self._cache.trace
        if trace.dropped + len(trace) < self._seen:
            raise ValueError("the cache's trace was cleared while it was recorded; clear it before or afterwards")
        if trace.dropped > self._seen:
            raise ValueError(
                f"the cache's trace keeps {trace.limit} decisions and dropped some that were not recorded yet; attach "
                f"with a larger trace="
            )
        new, self._seen = trace[self._seen - trace.dropped :], trace.dropped + len(trace)
        return [decision for decision in new if decision.stream == self._stream]

    def _figures(self, frames: Frames, reference: Frames | None) -> dict[str, Any]:
        """What the page's table shows, under the names of ``report.json``."""
        skip, seconds = skip_rate(self._decisions), _mean_seconds(self.chunks)
        figures: dict[str, Any] = {
            "name": self.rollout.name,
            "policy": self.rollout.policy,
            "skip": skip,
            "end_to_end_ms_per_chunk": 1e3 * seconds,
            "bytes_held": max((g.bytes_held or 0 for g in self.chunks), default=0),
            "reasons": dict(Counter(decision.reason for decision in self._decisions)),
            **_fidelity(frames, reference, self.rollout.rows),
        }
        if self._reference is not None:
            figures["speedup"] = _mean_seconds(self._reference.chunks) / seconds
            if self.rollout.block_share is not None:
                timed = {chunk.chunk for chunk in _timed(self.chunks)}
                skipped = saved(d for d in self._decisions if d.chunk in timed).skip
                figures["speedup_bound"] = amdahl_bound(self.rollout.block_share, skipped)
        return figures


def _mean_seconds(chunks: Sequence[ChunkRecord]) -> float:
    """Mean seconds of a chunk that is timed."""
    return fmean(g.seconds for g in _timed(chunks))


def _timed(chunks: Sequence[ChunkRecord]) -> Sequence[ChunkRecord]:
    """The first chunk warms up and is left out, unless it is the only one."""
    return chunks[1:] or chunks


def _fidelity(frames: Frames, reference: Frames | None, rows: Rows | None) -> dict[str, Any]:
    """PSNR and SSIM per camera and stitched; a reference equals itself."""
    if reference is None:
        perfect = {"psnr_db": None, "ssim": 1.0, "lpips": None}
        return {STITCHED: perfect, "cameras": dict.fromkeys(frames, perfect)}
    canvas = arrange({name: (video.shape[2], video.shape[1]) for name, video in frames.items()}, rows)
    covered = canvas.compose({name: np.ones(video.shape[1:], np.uint8) for name, video in frames.items()})[..., 0] > 0
    errors = {name: squared_errors(video, reference[name]) for name, video in frames.items()}
    pixels = {name: video.shape[1] * video.shape[2] for name, video in frames.items()}
    together = np.asarray(sum(errors[name] * size for name, size in pixels.items()) / sum(pixels.values()))
    sampled = range(0, len(together), EVERY)
    similar = {name: [ssim(video[t], reference[name][t]) for t in sampled] for name, video in frames.items()}
    pairs = [[canvas.compose({n: v[t] for n, v in side.items()}) for side in (frames, reference)] for t in sampled]
    views = {name: _view(errors[name], similar[name]) for name in frames}
    return {STITCHED: _view(together, [ssim(a, b, covered) for a, b in pairs]), "cameras": views}


def _view(errors: NDArray[np.float64], similar: Sequence[float]) -> dict[str, float | None]:
    decibels = psnr(errors)
    return {"psnr_db": decibels if np.isfinite(decibels) else None, "ssim": fmean(similar), "lpips": None}

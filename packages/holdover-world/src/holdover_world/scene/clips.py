"""Clips on disk: one video per camera, and one table of actions and poses. Needs no simulator.

    DIR/dataset.json                        {"format": 1, "fps": 12, "cameras": [...]}
    DIR/<scenario>-<seed>/<camera>.mp4      colour, H.264
    DIR/<scenario>-<seed>/<camera>.depth.mkv    depth, FFV1, 16-bit centimetres (optional; may be shorter than colour)
    DIR/<scenario>-<seed>/clip.parquet      one row per frame: commands, motion, pose
    DIR/<scenario>-<seed>/layout.npz        map and cars (optional; `holdover_world.scene.layout`)
    DIR/<scenario>-<seed>/clip.json         {"scenario", "seed", "frames", "holdover"}

**Row k holds the command that was in force while the world moved from frame k-1 to frame k**. Command k causes frame k,
so a model that draws frame k may be told command k. Row 0 holds the command of the rows after it, although nothing has
moved yet. Commands change only at frames that are multiples of four. Speed, curvature and pose of row k are those that
frame k shows.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from numpy.typing import NDArray

from holdover_world.scene.cameras import FPS, RIG, Camera
from holdover_world.scene.layout import Layout, Track
from holdover_world.scene.vehicles import normalise_action

# Typed loosely: pyarrow ships no types.
_arrow: Any = pyarrow
_parquet: Any = pyarrow.parquet

FORMAT = 1
COLUMNS = ("time", "speed_command", "curvature_command", "speed", "curvature", "x", "y", "yaw")
_DEPTH_STEPS = 100.0  # per metre
_MAX_DEPTH = 65535


@dataclass(frozen=True)
class Clip:
    """T frames of a clip.

    Attributes:
        frames: per camera uint8 ``[T, H, W, 3]``.
        depth: per camera float32 ``[T, H, W]``, metres along the viewing axis, 655.35 for the sky; None if not read.
        actions: float32 ``[T, 2]``, normalised speed and curvature. Action k causes frame k.
        poses: float64 ``[T, 3]``: x and y in metres, yaw in radians.
        motion: float64 ``[T, 2]``: the actual speed and curvature.
    """

    scenario: str
    seed: int
    frames: dict[str, NDArray[np.uint8]]
    depth: dict[str, NDArray[np.float32]] | None
    actions: NDArray[np.float32]
    poses: NDArray[np.float64]
    motion: NDArray[np.float64]


def list_clips(folder: Path | str) -> list[Path]:
    """The finished clips in a dataset folder, sorted by name.

    Raises:
        FileNotFoundError: the folder is not a dataset.
        ValueError: it is in a format that this version cannot read.
    """
    read_cameras(folder)
    return sorted(path.parent for path in Path(folder).glob("*-*/clip.json") if not path.parent.name.startswith("."))


def read_cameras(folder: Path | str) -> tuple[Camera, ...]:
    """The cameras of a dataset folder. Errors are those of `list_clips`."""
    index = Path(folder) / "dataset.json"
    if not index.is_file():
        raise FileNotFoundError(f"{index} is missing: {folder} is not a folder of clips")
    content = _read_json(index)
    if content.get("format") != FORMAT:
        raise ValueError(f"{index} has format {content.get('format')!r}, this version reads format {FORMAT}")
    return tuple(Camera(**{**fields, "position": tuple(fields["position"])}) for fields in content["cameras"])


def frame_count(clip: Path) -> int:
    """The number of frames of a clip. Errors are those of `read_clip`."""
    return int(_read_json(clip / "clip.json")["frames"])


def read_clip(
    path: Path | str,
    *,
    depth: bool = False,
    cameras: Sequence[str] | None = None,
    start: int = 0,
    frames: int | None = None,
) -> Clip:
    """Read a clip, or ``frames`` frames of it from ``start`` on, for all cameras or those named.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a file is damaged or too short, or an argument is out of range; the message names it.
    """
    folder = Path(path)
    about = _read_json(folder / "clip.json")
    total = int(about["frames"])
    count = total - start if frames is None else frames
    if start < 0 or count < 1 or start + count > total:
        raise ValueError(f"frames {start} to {start + count} are not in {folder}, which has {total}; ask for fewer")
    names = [camera.name for camera in read_cameras(folder.parent)] if cameras is None else list(cameras)
    colour = {name: _read_video(folder / f"{name}.mp4", "rgb24", start, count) for name in names}
    metres = None
    if depth:
        raw = {name: _read_video(folder / f"{name}.depth.mkv", "gray16le", start, count) for name in names}
        metres = {name: (image / np.float32(_DEPTH_STEPS)).astype(np.float32) for name, image in raw.items()}
    table = _read_table(folder / "clip.parquet", total)[start : start + count]
    column = {name: table[:, k] for k, name in enumerate(COLUMNS)}
    return Clip(
        scenario=about["scenario"],
        seed=int(about["seed"]),
        frames=colour,
        depth=metres,
        actions=normalise_action(column["speed_command"], column["curvature_command"]),
        poses=np.stack([column["x"], column["y"], column["yaw"]], axis=1),
        motion=np.stack([column["speed"], column["curvature"]], axis=1),
    )


def read_track(path: Path | str) -> Track | None:
    """How a recording goes through its layout; None if it has no layout. Errors are those of `read_clip`."""
    folder = Path(path)
    if (layout := Layout.load(folder)) is None:
        return None
    table = torch.from_numpy(_read_table(folder / "clip.parquet", frame_count(folder)))
    pose, motion = ([COLUMNS.index(name) for name in names] for names in (("x", "y", "yaw"), ("speed", "curvature")))
    return Track(layout, table[:, pose], table[:, motion])


def clip_name(scenario: str, seed: int) -> str:
    """The folder name of a clip."""
    return f"{scenario}-{seed:06d}"


def open_dataset(folder: Path, cameras: Iterable[Camera] = RIG) -> None:
    """Create a dataset folder, or check that an existing one has the same cameras.

    Raises:
        ValueError: the folder holds clips of other cameras.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cameras = tuple(cameras)
    if not (folder / "dataset.json").exists():
        content = {"format": FORMAT, "fps": FPS, "cameras": [asdict(camera) for camera in cameras]}
        (folder / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")
    if read_cameras(folder) != cameras:
        raise ValueError(f"{folder} holds clips of other cameras: choose another folder, or remove it")


class ClipWriter:
    """Writes one clip, under a temporary name until ``finish``, so that no half-written clip is read.

    Leaving the ``with`` block without ``finish`` removes the files.
    """

    def __init__(
        self, folder: Path, scenario: str, seed: int, *, cameras: Sequence[Camera] = RIG, depth: bool = True
    ) -> None:
        self._target = folder / clip_name(scenario, seed)
        # A unique name, so that two recordings into one folder never write into each other's files.
        self._working = Path(tempfile.mkdtemp(dir=folder, prefix=f".{self._target.name}.", suffix=".part"))
        self._working.chmod(0o755)
        self._about = {"scenario": scenario, "seed": seed}
        self._rows: list[tuple[float, ...]] = []
        self._colour = {c.name: _Video(self._working / f"{c.name}.mp4", c, depth=False) for c in cameras}
        depth_cameras = cameras if depth else ()
        self._depth = {c.name: _Video(self._working / f"{c.name}.depth.mkv", c, depth=True) for c in depth_cameras}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        shutil.rmtree(self._working, ignore_errors=True)

    def add(
        self,
        rgb: Mapping[str, NDArray[np.uint8]],
        depth: Mapping[str, NDArray[np.float32]] | None,
        *,
        command: tuple[float, float],
        motion: tuple[float, float],
        pose: tuple[float, float, float],
    ) -> None:
        """Append a frame, the command that led to it (m/s, 1/m), and the ego's motion and pose in this frame."""
        for name, video in self._colour.items():
            video.add(rgb[name])
        for name, video in self._depth.items():
            assert depth is not None
            video.add(np.clip(np.rint(depth[name] * _DEPTH_STEPS), 0, _MAX_DEPTH).astype(np.uint16))
        self._rows.append((len(self._rows) / FPS, *command, *motion, *pose))

    def finish(self, layout: Layout | None = None) -> Path:
        """Complete the clip, give it its name and return its folder."""
        self._close()
        if layout is not None:
            layout.save(self._working)
        table = {"frame": _arrow.array(range(len(self._rows)), _arrow.int32())}
        table |= {
            name: _arrow.array([row[k] for row in self._rows], _arrow.float64()) for k, name in enumerate(COLUMNS)
        }
        _parquet.write_table(_arrow.table(table), self._working / "clip.parquet")
        about = {**self._about, "frames": len(self._rows), "holdover": version("holdover")}
        (self._working / "clip.json").write_text(json.dumps(about) + "\n")
        shutil.rmtree(self._target, ignore_errors=True)
        self._working.rename(self._target)
        return self._target

    def _close(self) -> None:
        for video in (*self._colour.values(), *self._depth.values()):
            video.close()
        self._colour, self._depth = {}, {}


class _Video:
    """One video file being written."""

    def __init__(self, path: Path, camera: Camera, *, depth: bool) -> None:
        self._container = av.open(str(path), "w")
        codec = "ffv1" if depth else "libx264"
        # A key frame every second makes reading from the middle cheap. One thread: several clips record at once.
        options = {} if depth else {"crf": "14", "preset": "veryfast", "g": str(FPS), "threads": "1", "bf": "0"}
        stream = self._container.add_stream(codec, rate=FPS, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = camera.width, camera.height
        stream.pix_fmt = "gray16le" if depth else "yuv444p"
        stream.codec_context.time_base = Fraction(1, FPS)
        self._stream, self._format, self._count = stream, "gray16le" if depth else "rgb24", 0

    def add(self, image: NDArray[Any]) -> None:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=self._format)
        frame.pts, self._count = self._count, self._count + 1
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()


def _read_video(path: Path, pixel_format: str, start: int, count: int) -> NDArray[Any]:
    """Frames ``start`` to ``start + count`` as ``[count, H, W]`` or ``[count, H, W, 3]``."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    images: list[NDArray[Any]] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.time_base is not None
            frame_time = 1 / (stream.time_base * FPS)
            if start:
                container.seek(int(start * frame_time), stream=stream)
            for frame in container.decode(stream):
                # Matroska keeps milliseconds, so times are rounded to the nearest frame.
                if frame.pts is not None and round(frame.pts / frame_time) >= start:
                    images.append(frame.to_ndarray(format=pixel_format))
                if len(images) == count:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is damaged ({error}): record the clip again") from error
    if len(images) < count:
        raise ValueError(f"{path} ends after {start + len(images)} frames, {start + count} are needed: record it again")
    return np.stack(images)


def _read_table(path: Path, rows: int) -> NDArray[np.float64]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        table = _parquet.read_table(path, columns=list(COLUMNS))
    except (_arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): record the clip again") from error
    if table.num_rows != rows:
        raise ValueError(f"{path} has {table.num_rows} rows, {rows} are needed: record the clip again")
    return np.stack([np.asarray(table[name]) for name in COLUMNS], axis=1)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return content

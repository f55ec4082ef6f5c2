"""Side-by-side videos that browsers play."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from holdover.report.files import whole

_GAP = 8  # pixels between the pictures, before scaling


def write_side_by_side(path: Path, videos: Sequence[NDArray[np.uint8]], *, fps: int, scale: int = 2) -> None:
    """Write videos next to each other, left to right, as H.264 in MP4 (yuv420p).

    Args:
        path: ends in ``.mp4``.
        videos: ``uint8 [T, height, width, 3]`` each, of one shape.
        fps: frames per second.
        scale: by how much the picture is enlarged (Lanczos).

    Raises:
        ValueError: the videos differ in shape.
    """
    shapes = {video.shape for video in videos}
    if len(shapes) != 1:
        raise ValueError(f"videos of shapes {sorted(shapes)} do not stand side by side; give one or more of one shape")
    frames, height, width, _ = shapes.pop()
    gap = np.zeros((height, _GAP, 3), dtype=np.uint8)
    # yuv420p halves the chroma, so both sides must be even.
    size = {"width": scale * (len(videos) * (width + _GAP) - _GAP) // 2 * 2, "height": scale * height // 2 * 2}
    with whole(path) as partial, av.open(str(partial), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "18", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = size["width"], size["height"], "yuv420p"
        for t in range(frames):
            row = [part for video in videos for part in (gap, video[t])][1:]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.concatenate(row, axis=1)), format="rgb24")
            container.mux(stream.encode(picture.reformat(**size, format="yuv420p", interpolation="LANCZOS")))
        container.mux(stream.encode())

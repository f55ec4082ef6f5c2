"""Videos that browsers can play, and in which they can seek to any frame."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from holdover.report.files import whole

#: Frames from one key frame to the next. Seeking decodes no more than these.
GROUP = 6
_OPTIONS = {"preset": "veryfast", "g": str(GROUP), "bf": "0"}
_BT709 = 1


def frame_rate(fps: float) -> Fraction:
    """Frames per second as a ratio that a container can hold.

    Raises:
        ValueError: it is not a positive number.
    """
    if not 0 < fps < 1000:
        raise ValueError(f"fps={fps} is not a frame rate; give frames per second")
    return Fraction(fps).limit_denominator(1001)


def write_video(path: Path, pictures: Iterable[NDArray[np.uint8]], *, fps: float, crf: int = 14) -> None:
    """Write pictures ``[height, width, 3]`` of one even size as H.264 in MP4 (yuv420p, BT.709, constant frame rate).

    Args:
        crf: the quality of the encoder; lower is better.

    Raises:
        ValueError: there is no picture.
    """
    stream = None
    with whole(path) as partial, av.open(str(partial), "w", options={"movflags": "faststart"}) as container:
        for picture in pictures:
            if stream is None:
                stream = container.add_stream("libx264", rate=frame_rate(fps), options={**_OPTIONS, "crf": str(crf)})
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
                # Written down, so that no browser has to guess the matrix back to RGB.
                context = stream.codec_context
                context.colorspace = context.color_primaries = context.color_trc = _BT709
                context.color_range = ColorRange.MPEG
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.colorspace = _BT709
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError(f"{path} would have no picture; give at least one")
        container.mux(stream.encode())

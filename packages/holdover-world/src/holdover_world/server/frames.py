"""Coding of frames: each as a picture, or all frames of a chunk as one fragment of a video."""

from __future__ import annotations

import io
from collections.abc import Mapping
from fractions import Fraction
from functools import cache

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from holdover_world.scene.cameras import FPS
from holdover_world.server.protocol import FrameFormat, VideoTrack

#: One fragment for each chunk. It begins with a key frame and carries its time, so a player can join at any chunk, and
#: no state of the coder is kept between chunks.
_MUXER = {
    "movflags": "empty_moov+default_base_moof+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",  # otherwise the times of every fragment would begin at zero
    "video_track_timescale": str(FPS),
}
_CODER = {"preset": "veryfast", "tune": "zerolatency", "crf": "18", "threads": "1"}


def encode_frames(frames: Mapping[str, NDArray[np.uint8]], form: FrameFormat, index: int) -> dict[str, list[bytes]]:
    """Code the frames of chunk ``index``, ``uint8 [T, height, width, 3]`` per camera: as T pictures or one fragment."""
    if form == "mp4":
        return {camera: [_segments(video, index)[1]] for camera, video in frames.items()}
    return {camera: [_picture(frame, form) for frame in video] for camera, video in frames.items()}


@cache
def video_track(width: int, height: int) -> VideoTrack:
    """What a player needs before the first fragment of a camera of this size."""
    init = _segments(np.zeros((1, height, width, 3), np.uint8), 0)[0]
    profile = init[init.index(b"avcC") + 5 :][:3].hex()  # RFC 6381, section 3.3
    return VideoTrack(type=f'video/mp4; codecs="avc1.{profile}"', init=init)


def _picture(frame: NDArray[np.uint8], form: FrameFormat) -> bytes:
    buffer, options = io.BytesIO(), {"lossless": True, "method": 0} if form == "webp" else {"quality": 90}
    Image.fromarray(frame).save(buffer, form, **options)
    return buffer.getvalue()


def _segments(video: NDArray[np.uint8], index: int) -> tuple[bytes, bytes]:
    """The init segment, equal for all videos of one size, and the media segment (ISO 14496-12, section 8.8)."""
    buffer, (count, height, width, _) = io.BytesIO(), video.shape
    with av.open(buffer, "w", format="mp4", options={**_MUXER, "fragment_index": str(index + 1)}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=_CODER)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        for n, image in enumerate(video):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index * count + n, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    coded = buffer.getvalue()
    at = coded.index(b"moof") - 4
    return coded[:at], coded[at:]

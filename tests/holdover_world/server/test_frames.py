"""Video as fragments: received over a real socket and decoded by an independent player."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from holdover_world.scene.cameras import FPS
from tests.holdover_world.server.live import running
from tests.holdover_world.server.test_server import drive, solo
from tests.holdover_world.sessions.small import action

LUMA = np.array([0.299, 0.587, 0.114])


def decoded(init: bytes, fragments: list[bytes]) -> tuple[list[int], NDArray[np.uint8]]:
    """The frame numbers and frames ``[T, height, width, 3]`` of a fragmented MP4."""
    with av.open(io.BytesIO(init + b"".join(fragments))) as container:
        frames = [(round(frame.time * FPS), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [number for number, _ in frames], np.stack([frame for _, frame in frames])


def test_a_stream_of_fragments_is_a_video_that_can_be_joined_anywhere(tmp_path: Path) -> None:
    with running(tmp_path) as live:
        id = live.create(seed=5, format="mp4")
        with live.stream(id) as stream:
            video = stream.hello["video"]
            made = drive(stream, 5, 0, 3)
            made += [stream.step(n, action(n, 5), ack=False) for n in (3, 4)]
        with live.stream(id, "?after=2") as stream:
            assert stream.hello["video"] == video
            joined = [stream.receive(), stream.receive()]
    expected = solo(5, 5)
    for camera, track in video.items():
        numbers, shown = decoded(track["init"], [fragment for each in made for fragment in each["frames"][camera]])
        assert numbers == list(range(20))
        # Colour has half the resolution, and these frames are noise: compare the brightness.
        truth = np.concatenate([each[camera] for each in expected]) @ LUMA
        assert np.abs(shown @ LUMA - truth).mean() < 4
        # Each frame is nearest to its own original, and three times as far from the one before.
        distances = np.stack([np.abs(frame @ LUMA - truth).mean((1, 2)) for frame in shown])
        assert (distances.argmin(1) == np.arange(20)).all()
        assert distances.diagonal(-1).mean() > 3 * distances.diagonal().mean()
        numbers, again = decoded(track["init"], [fragment for each in joined for fragment in each["frames"][camera]])
        assert numbers == list(range(12, 20))
        assert np.array_equal(again, shown[12:])
    assert np.array_equal(*(np.array(each["frames"]["rear"]) for each in (made[3], joined[0])))

"""Tables, curves, files, plots and videos."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from holdover.decision import Decision
from holdover.report import tables
from holdover.report.canvas import arrange
from holdover.report.decisions import cosine_by_step_and_block, skip_by_block
from holdover.report.files import whole, write_json, write_text
from holdover.report.plots import plot_block_skip, plot_chunks, plot_cosine_maps, plot_front, plot_psnr, plot_reactions
from holdover.report.video import GROUP, frame_rate, write_video


def decision(block: int, *, index: int = 0, computed: bool = True, reason: str = "cosine", **changes: Any) -> Decision:
    fields = {
        "stream": "default",
        "branch": "",
        "chunk": 3,
        "slot": f"blocks.{block}",
        "role": "denoise",
        "scores": {},
        "sigma": None,
        **changes,
    }
    return Decision(index=index, block=block, computed=computed, reason=reason, **fields)


def test_skip_by_block_leaves_out_warm_up_and_other_roles() -> None:
    decisions = [
        decision(0, reason="anchor"),
        decision(1, computed=False, reason="reuse"),
        decision(1),
        decision(1, reason="warm-up"),
        decision(1, reason="kv update", role="kv_update"),
    ]
    skip = skip_by_block(decisions, 3)
    assert skip[:2].tolist() == [0.0, 0.5]
    assert np.isnan(skip[2])


def test_cosines_are_means_where_the_gate_was_asked() -> None:
    decisions = [
        decision(0, reason="anchor"),
        decision(1, index=1, scores={"cosine": 0.9}),
        decision(1, index=1, computed=False, scores={"cosine": 1.0}),
    ]
    cosines = cosine_by_step_and_block(decisions, 2, 2)
    assert cosines[1, 1] == pytest.approx(0.95)
    assert np.isnan(cosines).sum() == 3


@pytest.mark.parametrize(
    ("value", "text"), [(3.3e-4, "3.3e-4"), (0.0, "0"), (None, "–"), (1.26e-11, "1.3e-11"), (0.27, "2.7e-1")]
)
def test_small_numbers(value: float | None, text: str) -> None:
    assert tables.scientific(value) == text


def test_numbers_in_words() -> None:
    assert (tables.decibels(None), tables.decibels(51.372)) == ("equal", "51.37")
    assert (tables.percent(None), tables.percent(0.714)) == ("–", "71.4 %")
    assert (tables.ratio(None), tables.ratio(0.042)) == ("–", "0.04")


def test_markdown_tables() -> None:
    assert tables.markdown(("a", "b"), [("x|y", "1")]) == "| a | b |\n| :-- | --: |\n| x\\|y | 1 |\n"


def test_published_figures_are_a_row() -> None:
    row = tables.published_row("urban", {"PSNR": "51.37", "skip": "71.4 %"})
    assert dict(zip(tables.COLUMNS, row, strict=True)) == {
        **dict.fromkeys(tables.COLUMNS, "–"),
        "scenario": "urban",
        "policy": "published",
        "PSNR": "51.37",
        "skip": "71.4 %",
    }


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figure.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": float("nan")})

    def fail_half_way() -> None:
        with whole(path) as partial:
            partial.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert list(path.parent.iterdir()) == []
    write_json(path, {"value": 1})
    assert json.loads(path.read_text()) == {"value": 1}
    write_text(path, "other")
    assert [p.name for p in path.parent.iterdir()] == ["figure.json"]


def test_a_video_has_every_frame_in_its_place_and_its_colours(tmp_path: Path) -> None:
    colours = [(220, 30, 30), (30, 200, 60), (40, 60, 210), (128, 128, 128), (250, 250, 250), (5, 5, 5), (200, 160, 20)]
    pictures = [np.full((32, 48, 3), colour, np.uint8) for colour in colours]
    write_video(tmp_path / "video.mp4", iter(pictures), fps=12)
    with av.open(str(tmp_path / "video.mp4")) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        context = stream.codec_context
        assert (context.name, context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 12)
        assert [round(frame.time * 12) for frame in frames] == list(range(len(colours)))
        for frame, colour in zip(frames, colours, strict=True):
            shown = frame.to_ndarray(format="rgb24")[16, 24]
            assert np.abs(shown.astype(int) - colour).max() <= 4
    write_video(tmp_path / "still.mp4", [pictures[0]] * (2 * GROUP + 1), fps=12)
    with av.open(str(tmp_path / "still.mp4")) as container:
        keys = [t for t, frame in enumerate(container.decode(video=0)) if frame.key_frame]
        assert keys == [0, GROUP, 2 * GROUP]  # from each of which a browser decodes, to seek
    with pytest.raises(ValueError, match="no picture"):
        write_video(tmp_path / "none.mp4", [], fps=12)
    assert not (tmp_path / "none.mp4").exists()
    for fps in (0, -1, math.nan):
        with pytest.raises(ValueError, match="frame rate"):
            frame_rate(fps)
    assert frame_rate(30000 / 1001) == Fraction(30000, 1001)


@pytest.mark.parametrize("rows", [None, [["a"], ["b", "c"]], [["a", "b"]]])
def test_cameras_stand_in_rows_without_overlap(rows: list[list[str]] | None) -> None:
    sizes = {"a": (31, 20), "b": (20, 11), "c": (5, 5)}
    canvas = arrange(sizes, rows)
    assert (canvas.width % 2, canvas.height % 2) == (0, 0)
    pictures = {name: np.full((h, w, 3), i + 1, np.uint8) for i, (name, (w, h)) in enumerate(sizes.items())}
    whole_canvas = canvas.compose(pictures)
    for i, (name, (w, h)) in enumerate(sizes.items()):
        assert (whole_canvas[..., 0] == i + 1).sum() == w * h
        left, top, width, height = canvas.rects[name]
        assert (whole_canvas[top : top + height, left : left + width] == i + 1).all()


def test_plots_are_pictures(tmp_path: Path) -> None:
    nan = np.nan
    plot_block_skip(tmp_path / "skip.png", {"a": np.array([0, 0.7, 0.7]), "b": np.array([0, 0.5, nan])})
    plot_cosine_maps(tmp_path / "maps.png", {"a": np.array([[nan, 0.99], [nan, 0.98]]), "b": np.full((2, 2), nan)})
    values = np.array([60.0, np.inf, 55, nan])
    plot_psnr(tmp_path / "psnr.png", {"a": {"front": values, "stitched": values}, "b": {"front": values}}, fps=12)
    plot_chunks(tmp_path / "time.png", {"a": values, "b": values}, label="ms", bounds={"a": values})
    plot_reactions(tmp_path / "reaction.png", {"a": {"brake": [0.1, None, 1.0]}, "b": {"steer": [1.0]}})
    plot_front(tmp_path / "front.png", {"a": [("urban", 2.0, 45.0)]})
    for name in ("skip", "maps", "psnr", "time", "reaction", "front"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_cameras_stand_in_the_rows_that_are_given() -> None:
    canvas = arrange({"a": (30, 20), "b": (20, 12), "c": (4, 4)}, [["b", "none"], ["a", "c"]])
    assert canvas.rects == {"b": (7, 0, 20, 12), "a": (0, 12, 30, 20), "c": (30, 12, 4, 4)}
    assert (canvas.width, canvas.height) == (34, 32)

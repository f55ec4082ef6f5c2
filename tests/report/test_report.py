"""Tables, curves, files, plots and videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from holdover.engine.trace import Decision
from holdover.report import tables
from holdover.report.decisions import cosine_by_step_and_block, skip_by_block
from holdover.report.files import whole, write_json, write_text
from holdover.report.plots import plot_block_skip, plot_cosine_maps, plot_psnr_over_time, plot_training
from holdover.report.published import X_CACHE
from holdover.report.video import write_side_by_side


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


def test_the_published_figures_fit_each_other() -> None:
    for published in X_CACHE.values():
        assert published.full_seconds / published.cached_seconds == pytest.approx(published.speedup, abs=0.01)
        assert len(tables.published_row(published)) == len(tables.COLUMNS)


def test_a_table_is_never_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    policy = {
        "name": "xcache",
        "policy": "x",
        "stitched": {"psnr_db": 51.0, "ssim": 0.999, "lpips": 1e-4},
        "skip": 0.68,
        "dit_ms_per_generation": 180.0,
        "end_to_end_ms_per_generation": 190.0,
        "speedup": 2.1,
        "speedup_bound": 2.5,
        "bytes_held": 2**20,
        "reaction": {"brake": 0.04, "steer": 1.0},
    }
    full = {**policy, "name": "full", "policy": None}
    report = {"scenarios": [{"name": "urban", "policies": [full, policy]}]}
    tables.print_whole(tables.demo_table(report))
    text = capsys.readouterr().out
    for cell in ("reference", "51.00", "1.0e-4", "68.0 %", "2.10×", "2.50×", "0.04", "3682 → 1392"):
        assert cell in text


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


def test_a_video_plays_in_a_browser_and_shows_left_and_right(tmp_path: Path) -> None:
    red, blue = np.zeros((2, 5, 16, 24, 3), np.uint8)
    red[..., 0], blue[..., 2] = 220, 220
    write_side_by_side(tmp_path / "pair.mp4", [red, blue], fps=12, scale=2)
    with av.open(str(tmp_path / "pair.mp4")) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 12
    assert len(frames) == 5
    assert frames[0].shape == (32, 112, 3)
    assert frames[2][16, 24, 0] > 180 > 60 > frames[2][16, 24, 2]
    assert frames[2][16, 88, 2] > 180 > 60 > frames[2][16, 88, 0]
    with pytest.raises(ValueError, match="one shape"):
        write_side_by_side(tmp_path / "pair.mp4", [red, blue[:, :8]], fps=12)


def test_plots_are_pictures(tmp_path: Path) -> None:
    nan = np.nan
    plot_block_skip(tmp_path / "skip.png", {"a": np.array([0, 0.7, 0.7]), "b": np.array([0, 0.5, nan])})
    plot_cosine_maps(tmp_path / "maps.png", {"a": np.array([[nan, 0.99], [nan, 0.98]]), "b": np.full((2, 2), nan)})
    plot_psnr_over_time(tmp_path / "psnr.png", {"a": np.array([60.0, np.inf, 55, nan])}, seconds=1.0)
    log = [{"step": i, "loss": 1 / (i + 1)} for i in range(120)]
    log[50] |= {"heldout_psnr_db": [14.0, 15.0]}
    log[119] |= {"heldout_psnr_db": [18.0, 20.0]}
    plot_training(tmp_path / "curve.png", log)
    for name in ("skip", "maps", "psnr", "curve"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

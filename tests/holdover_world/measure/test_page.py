"""The demo's table and the parts of its page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from holdover.report import tables
from holdover.report.canvas import arrange
from holdover.report.page import build_page
from holdover.report.run_dir import ChunkRecord, Rollout
from holdover.report.run_write import write_rollout
from holdover_world.loop.scenarios import shipped_clips
from holdover_world.measure.published import X_CACHE
from holdover_world.measure.tables import demo_table, published_figures, result_lines
from holdover_world.scene.cameras import RIG, STITCH_ROWS, stitch
from holdover_world.scene.clips import list_clips, read_clip


def test_the_published_figures_fit_each_other() -> None:
    for scenario, published in X_CACHE.items():
        assert published.full_seconds / published.cached_seconds == pytest.approx(published.speedup, abs=0.01)
        assert published_figures(scenario).keys() - {"source"} <= set(tables.COLUMNS)
    assert published_figures("urban-steady") == {}


def test_a_table_is_never_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    policy = {
        "name": "xcache",
        "policy": "x",
        "stitched": {"psnr_db": 51.0, "ssim": 0.999, "lpips": 1e-4},
        "skip": 0.68,
        "dit_ms_per_chunk": 180.0,
        "end_to_end_ms_per_chunk": 190.0,
        "speedup": 2.1,
        "speedup_spread": [1.9, 2.2],
        "speedup_bound": 2.5,
        "bytes_held": 2**20,
        "reaction": {"brake": 0.04, "steer": 1.0},
    }
    full = {**policy, "name": "full", "policy": None}
    drive = {"name": "urban-oracle", "title": "urban, oracle plan", "scenario": "urban", "policies": [policy, full]}
    report = {"scenarios": [drive], "environment": {"dtype": "float32"}}
    tables.print_whole(demo_table(report))
    text = capsys.readouterr().out
    for cell in ("reference", "51.00", "1.0e-4", "68.0 %", "2.10× (1.90–2.20)", "2.50×", "0.04", "3682 → 1392"):
        assert cell in text
    assert "In float32" in text
    assert "urban, oracle plan" in text
    assert list(result_lines(report)) == [
        "urban, oracle plan, float32: xcache 2.10× (1.90–2.20), 51.00 dB, 68.0 % skipped; full compute 180 ms a chunk"
    ]


def test_no_figure_says_more_than_was_measured() -> None:
    figures = {"cycles_timed": 5, "speedup": 1.04, "speedup_spread": [0.98, 1.1], "dit_ms_per_chunk": 90.4}
    assert tables.speed(figures) == "≈ 1 (0.98–1.10)"
    assert tables.speed({**figures, "speedup_spread": [1.01, 1.1]}) == "1.04× (1.01–1.10)"
    assert tables.milliseconds(figures, "dit_ms_per_chunk") == "90"
    spread = {**figures, "dit_ms_per_chunk_spread": [88.0, 93.5]}
    assert tables.milliseconds(spread, "dit_ms_per_chunk") == "90 (88–94)"
    assert tables.speed({**figures, "cycles_timed": 2}) == "–"
    assert tables.milliseconds({**spread, "cycles_timed": 2}, "dit_ms_per_chunk") == "–"
    assert tables.speed({"speedup": 2.0}) == "2.00×"  # a recording of one's own counts no cycles


def test_the_canvas_of_the_rig_is_the_stitched_view() -> None:
    rng = np.random.default_rng(0)
    frames = {c.name: rng.integers(0, 255, (c.height, c.width, 3), np.uint8) for c in RIG}
    canvas = arrange({c.name: (c.width, c.height) for c in RIG}, STITCH_ROWS)
    assert (canvas.compose(frames) == stitch(frames)).all()


def test_a_run_of_seven_cameras_and_22_seconds_is_small(tmp_path: Path) -> None:
    clip = read_clip(list_clips(shipped_clips())[0], frames=240)
    full = {name: np.concatenate([video, video[:24]]) for name, video in clip.frames.items()}
    noise = np.random.default_rng(0)
    cached = {n: (v.clip(4, 251) + noise.integers(-4, 5, v.shape, np.int8)).astype(np.uint8) for n, v in full.items()}
    chunks = [ChunkRecord(chunk=g, frames=4, seconds=1.0) for g in range(66)]
    write_rollout(tmp_path, Rollout(scenario="a", name="full", fps=12), full, chunks=chunks)
    rollout = Rollout(scenario="a", name="xcache", fps=12, reference="full")
    write_rollout(tmp_path, rollout, cached, chunks=chunks, reference=full)
    build_page(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 30e6

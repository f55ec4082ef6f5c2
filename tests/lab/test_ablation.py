"""The ablation and the overhead bench on a tiny model: complete, consistent, written whole."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from holdover.report.progress import bar
from holdover_world.model.transformer import WorldModel
from lab import ablation
from lab.ablation import ablation_arms, run_ablation
from lab.overhead import run_overhead
from tests.lab.small import cut_off_before_the_card


def test_overhead_compares_bits_and_times(model: WorldModel, clips: Path, tmp_path: Path) -> None:
    with bar() as progress:
        figures = run_overhead(model, tmp_path, chunks=12, clips=clips, progress=progress)
    rows = {row["name"]: row for row in figures["rows"]}
    assert rows["never"]["identical"]
    assert rows["closed gate"]["identical"]
    assert not rows["open gate"]["identical"]
    assert rows["never"]["skip"] == rows["closed gate"]["skip"] == 0
    assert rows["open gate"]["skip"] == 0.75  # all but the first of four blocks
    assert rows["never"]["bytes_held"] == 0 < rows["closed gate"]["bytes_held"]
    assert json.loads((tmp_path / "overhead.json").read_text()) == figures
    assert "| closed gate |" in (tmp_path / "overhead.md").read_text()
    with bar() as progress, pytest.raises(ValueError, match="chunks=4"):
        run_overhead(model, tmp_path, chunks=4, clips=clips, progress=progress)


def test_the_ablation_covers_what_it_promises() -> None:
    names = [arm.name for arm in ablation_arms()]
    assert len(names) == len(set(names))
    for word in ("step-0", "KV protection", "anchor", "floor 0.9", "fresh noise", "plain", "last protected", "emitted"):
        assert any(word in name for name in names), word


def test_the_ablation_writes_a_card(
    model: WorldModel, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ("full", "full, plain cadence", "default", "plain cadence", "last protected", "reactive")
    arms = [arm for arm in ablation_arms() if arm.name in chosen]
    monkeypatch.setattr(ablation, "ablation_arms", lambda: arms)
    monkeypatch.setattr(ablation, "KINDS", ("urban",))
    with bar() as progress:
        options: dict[str, Any] = {"chunks": 8, "scenarios": ("urban-steady",), "every": 8, "clips": clips}
        run = partial(run_ablation, model, tmp_path, progress=progress, **options)
        figures = cut_off_before_the_card(ablation, run, monkeypatch)
    assert json.loads((tmp_path / "ablation.json").read_text()) == figures
    rows = {row["name"]: row for row in figures["ablation"][0]["rows"]}
    assert rows["plain cadence"]["skip"] == 0
    assert rows["plain cadence"]["stitched"]["psnr_db"] is None  # nothing reused: equal
    assert rows["default"]["skip"] > rows["last protected"]["skip"] > 0
    assert rows["last protected"]["committed_as_emitted_db"] is None  # commits what it showed
    assert len(rows["default"]["psnr_db_by_window"]) == 2
    control = {row["name"]: row for row in figures["control"][0]["rows"]}
    assert control["plain cadence"]["truth"]["psnr_db_by_horizon"].keys() == {"1", "2"}
    text = (tmp_path / "ablation.md").read_text()
    assert "| PSNR by window | 1 | 2 |" in text
    assert "| urban | DiT ms |" in text
    assert not list(tmp_path.glob(".*"))
    with bar() as progress, pytest.raises(ValueError, match="give 8"):
        run_ablation(model, tmp_path, chunks=4, clips=clips, progress=progress)

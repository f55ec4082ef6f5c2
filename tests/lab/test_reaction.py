"""The bench of reactions: its summary, its card, and an interrupted run that continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holdover.report.progress import bar
from holdover_world.measure.race import Race
from holdover_world.measure.reaction import Reaction, run_race
from holdover_world.model.transformer import WorldModel
from lab import reaction
from lab.reaction import mean_late, run_reactions, summary


def brake(*ratios: float | None) -> Reaction:
    return Reaction(event="brake", position=1, ratios=ratios, response=1.0, error=0.0)


def test_a_summary_by_hand() -> None:
    assert mean_late([brake(0.1, 1.0), brake(1.0, 1.0)], "brake") == 0.5
    assert mean_late([brake(0.1, 1.0), brake(0.1, 0.2)], "brake") is None
    row = summary("some", "brake", [brake(0.5, 1.0), brake(None, 0.8)])
    assert (row["cases"], row["lowest"], row["ratio_by_chunk"]) == (2, 0.5, [0.5, 0.9])
    assert row["psnr_db"] is None


def test_the_bench_writes_a_card(model: WorldModel, clips: Path, tmp_path: Path) -> None:
    with bar() as progress:
        figures = run_reactions(model, tmp_path, chunks=8, count=1, clips=clips, progress=progress)
    assert {row["policy"] for row in figures["rows"]} == {"xcache", "xcache_reactive", "fixed_interval"}
    assert all(row["cases"] == 3 for row in figures["rows"])
    text = (tmp_path / "reaction.md").read_text()
    assert "| xcache_reactive | lane change |" in text
    with bar() as progress, pytest.raises(ValueError, match="no moment"):
        run_reactions(model, tmp_path, chunks=4, count=1, clips=clips, progress=progress)


def test_an_interrupted_bench_continues(
    model: WorldModel, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven, cut_off = [], 2

    def counted(race: Race, *args: Any, **options: Any) -> dict[str, list[Reaction]]:
        driven.append(race)
        if len(driven) == cut_off:
            raise KeyboardInterrupt
        return run_race(race, *args, **options)

    def run(out: Path) -> dict[str, Any]:
        with bar() as progress:
            return run_reactions(model, out, chunks=8, count=1, clips=clips, progress=progress)

    monkeypatch.setattr(reaction, "KINDS", ("urban", "highway"))
    monkeypatch.setattr(reaction, "run_race", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    figures = run(tmp_path / "cut")
    assert len(driven) == 3  # two scenarios, one of them twice
    assert run(tmp_path / "whole") == figures

"""`holdover trace`: the same decisions, in every form."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from holdover import cli
from holdover.report.decisions import category
from tests.holdover.report import runs

DECISIONS = runs.decisions(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_run(tmp_path_factory.mktemp("run"))


def trace(run: Path, *options: str, columns: int = 200) -> str:
    result = CliRunner().invoke(cli.app, ["trace", str(run), *options], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result.output


def test_the_terminal_shows_a_letter_for_every_decision(run: Path) -> None:
    letters = {"computed": "C", "reused": "·", "anchor": "A", "protected": "K", "warm-up": "W"}
    for columns in (200, 40):
        text = trace(run, "--scenario", "first", "--rollout", "xcache", columns=columns)
        shown = "".join(re.findall(r"[C·AKW]", text.partition("skipped\n")[2]))
        assert shown == "".join(letters[category(d)] for d in DECISIONS)
    skipped = [d.computed for d in DECISIONS if d.role == "denoise" and d.reason != "warm-up"]
    assert f"first / xcache: {100 * skipped.count(False) / len(skipped):.1f} % skipped" in text
    assert "other" not in text


def test_held_windows_and_parts_are_told_from_what_is_reused() -> None:
    reused = next(d for d in DECISIONS if not d.computed)
    assert category(reused) == "reused"
    assert category(replace(reused, reason="window")) == "held"
    assert category(replace(reused, scores={"recomputed": 0.25})) == "part"


def test_a_chunk_in_full(run: Path) -> None:
    text = trace(run, "--scenario", "first", "--rollout", "xcache", "--chunk", "7")
    lines = [line for line in text.splitlines() if "│" in line and ("denoise" in line or "kv_update" in line)]
    expected = [d for d in DECISIONS if d.chunk == 7]
    assert len(lines) == len(expected) == 4 * 6 + 6
    for line, d in zip(lines, expected, strict=True):
        assert d.reason in line
        if d.scores:
            assert f"{d.scores['cosine']:.6g}" in line
    result = CliRunner().invoke(cli.app, ["trace", str(run), "--chunk", "99"])
    assert result.exit_code == 2
    assert "chunk=99" in result.stderr


def test_tables_have_every_decision(run: Path, tmp_path: Path) -> None:
    trace(run, "--out", str(tmp_path / "all.parquet"))
    rows = pyarrow.parquet.read_table(tmp_path / "all.parquet").to_pylist()
    assert len(rows) == 3 * len(DECISIONS)
    mine = [row for row in rows if (row["scenario"], row["rollout"]) == ("first", "xcache")]
    for row, d in zip(mine, DECISIONS, strict=True):
        assert (row["chunk"], row["index"], row["block"], row["reason"]) == (d.chunk, d.index, d.block, d.reason)
        assert row["score_cosine"] == d.scores.get("cosine")
    trace(run, "--out", str(tmp_path / "all.csv"))
    with (tmp_path / "all.csv").open(newline="") as file:
        assert [row["reason"] for row in csv.DictReader(file)] == [row["reason"] for row in rows]
    result = CliRunner().invoke(cli.app, ["trace", str(run), "--out", str(tmp_path / "all.txt")])
    assert result.exit_code == 2
    assert "name the format by the suffix" in result.stderr


def test_the_chrome_trace_nests_and_has_a_slice_for_every_block(run: Path, tmp_path: Path) -> None:
    trace(run, "--out", str(tmp_path / "trace.json"))
    events: list[dict[str, Any]] = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert sorted(names.values()) == ["first / other", "first / xcache", "second / xcache"]
    pid = next(pid for pid, name in names.items() if name == "first / xcache")
    slices = [e for e in events if e["ph"] == "X" and e["pid"] == pid]
    blocks = [e for e in slices if "block" in e["args"]]
    assert [(e["name"], e["args"]["block"]) for e in blocks] == [(d.reason, d.block) for d in DECISIONS]
    colours = {(e["cname"], category(d)) for e, d in zip(blocks, DECISIONS, strict=True)}
    assert len(colours) == len({colour for colour, _ in colours}) == 5
    # Slices of one thread are drawn inside each other: none may cross the end of the one it began in.
    open_ends: list[float] = []
    for e in slices:
        begin, end = e["ts"], e["ts"] + e["dur"]
        while open_ends and open_ends[-1] <= begin + 1e-3:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1] + 1e-3
        assert len(open_ends) == (2 if "block" in e["args"] else 0 if e["name"].startswith("chunk") else 1)
        open_ends.append(end)
    chunks = [e for e in slices if e["name"].startswith("chunk")]
    assert [e["dur"] for e in chunks] == pytest.approx([0.3e6] * 24)


def test_damage_is_named(tmp_path: Path) -> None:
    run = runs.write_run(tmp_path / "run")
    (run / "first" / "xcache" / "decisions.parquet").write_bytes(b"PAR1")
    result = CliRunner().invoke(cli.app, ["trace", str(run), "--scenario", "first"])
    assert result.exit_code == 1
    assert "first/xcache/decisions.parquet is damaged" in result.stderr
    assert "first / other" in result.stdout

"""What a cache costs: the arms reuse what they say, and the figures are those of the passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from holdover import cli
from holdover.tune import overhead
from holdover.tune.counts import Counts
from holdover.tune.loop import Pass, Run, run
from holdover.tune.overhead import ARMS, arms, measure_overhead
from tests.holdover.toy import one_thread
from tests.holdover.tune.toys import few_chunks, growing, many_chunks, one_chunk, single_pass


@pytest.mark.parametrize("make", [many_chunks, few_chunks, one_chunk])
def test_the_arms_reuse_nothing_and_everything(make: Callable[[], Any]) -> None:
    model, loop = make()
    advanced: list[None] = []
    with one_thread():
        figures = measure_overhead(model, loop, rounds=1, advance=lambda: advanced.append(None))
        blocks = run(model, loop, arms(run(model, loop).passes)["always-hit"])
    assert len(advanced) == 2 * ARMS
    rows = {row["name"]: row for row in figures["rows"]}
    assert list(rows) == ["unattached", "never", "never-hit", "always-hit"]
    assert rows["unattached"]["ratio"] == 1
    assert rows["unattached"]["skip"] is None
    assert rows["never"]["skip"] == rows["never-hit"]["skip"] == 0
    assert all(rows[name]["identical"] for name in ("unattached", "never", "never-hit"))
    assert blocks.stats is not None
    assert rows["always-hit"]["skip"] == blocks.stats.skip >= 0.5
    assert (rows["never"]["bytes_held"], rows["never-hit"]["bytes_held"] > 0) == (0, True)
    assert all(row["ms_per_pass"] > 0 for row in rows.values())
    assert (rows["never"]["launches_per_pass"], rows["unattached"]["launches_per_pass"]) == (0, None)
    assert rows["never-hit"]["syncs_per_pass"] > 0


def test_ratios_are_medians_over_the_same_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes in which nothing can be reused, and the first round, do not count."""
    calls: list[Any] = []

    def fake(model: Any, loop: Any, policy: Any = None) -> Run:
        calls.append(policy)
        seconds = {None: 1.0, "never": 2.0}.get(policy and policy.name, 3.0)
        warm = 1 if len(calls) > ARMS else 100
        passes = [
            Pass(role="denoise", stream="default", chunk=0, index=0, seconds=1000.0),
            Pass(role="denoise", stream="default", chunk=1, index=0, seconds=seconds * warm),
            Pass(role="denoise", stream="default", chunk=2, index=0, seconds=2 * seconds * warm),
            Pass(role="denoise", stream="default", chunk=3, index=0, seconds=3 * seconds * warm),
            Pass(role="kv_update", stream="default", chunk=3, index=0, seconds=1000.0),
        ]
        return Run(passes=passes, output=(), stats=None, bytes_held=0)

    monkeypatch.setattr(overhead, "run", fake)
    counts = Counts(passes=4, syncs=2, launches=6, bytes_held=1)
    monkeypatch.setattr(overhead, "count", lambda *_: counts)
    figures = measure_overhead(None, None, rounds=3)  # type: ignore[arg-type]
    assert [row["ratio"] for row in figures["rows"]] == [1.0, 2.0, 3.0, 3.0]
    assert [row["ms_per_pass"] for row in figures["rows"]] == [2000.0, 4000.0, 6000.0, 6000.0]
    assert [row["syncs_per_pass"] for row in figures["rows"]] == [None, 0.5, 0.5, 0.5]
    assert [row["launches_per_pass"] for row in figures["rows"]] == [None, 1.5, 1.5, 1.5]
    assert figures["passes"] == 3
    assert len(calls) == 4 * ARMS
    assert [calls[n * ARMS] and calls[n * ARMS].name for n in range(3)] == [
        None,
        "never",
        "xcache",
    ]  # each leads in turn


def test_wrong_loops_are_named() -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        measure_overhead(*one_chunk(), rounds=0)
    with pytest.raises(ValueError, match="one step of one chunk"):
        measure_overhead(*single_pass())
    with pytest.raises(ValueError, match="different numbers of passes"):
        measure_overhead(*growing(), rounds=1)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    arguments = ["overhead", "tests.holdover.tune.toys:one_chunk", "--rounds", "2", "--out", str(out)]
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert (figures["rounds"], figures["passes"]) == (2, 3)
    for row in figures["rows"]:
        (line,) = (line for line in result.stdout.splitlines() if line.split()[:1] == [row["name"]])
        assert f"{row['ms_per_pass']:.3f}" in line
        assert row["launches_per_pass"] is None or f"{row['launches_per_pass']:.1f}" in line

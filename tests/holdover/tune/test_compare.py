"""Comparing methods: the figures are those of each method's own run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import holdover
from holdover import cli
from holdover.tune.compare import INTERVALS, LEFT_OUT, compare_methods
from holdover.tune.loop import run
from tests.holdover.toy import one_thread
from tests.holdover.tune.toys import few_chunks, many_chunks, noisy, one_chunk, silent


@pytest.mark.parametrize("make", [few_chunks, many_chunks])
def test_every_method_that_fits_is_compared(make: Callable[[], Any]) -> None:
    model, loop = make()
    with one_thread():
        figures = compare_methods(model, loop, rounds=1)
        full = run(model, loop)
        names = [row["name"] for row in figures["rows"]]
        unfit = figures["unfit"]
        assert names == [name for name in holdover.policies() if name not in LEFT_OUT and name not in unfit]
        assert list(unfit) == ["light_interaction"]
        assert "familiar" in unfit["light_interaction"]  # which is the user's to give
        assert figures["noise"] == 0
        for name in ("xcache", "taylorseer"):
            row = next(row for row in figures["rows"] if row["name"] == name)
            alone = run(model, loop, holdover.policy(name))
            assert alone.stats is not None
            assert row["skip"] == alone.stats.skip
            difference = torch.cat(alone.output, 1) - torch.cat(full.output, 1)
            assert row["error"] == pytest.approx(float(difference.norm() / torch.cat(full.output, 1).norm()), rel=1e-5)
    teacache = next(row for row in figures["rows"] if row["name"] == "teacache")
    assert "polynomial=(" in teacache["policy"]
    assert "polynomial=()" not in teacache["policy"]
    skips = {control["name"]: control["skip"] for control in figures["controls"]}
    for row in figures["rows"]:
        if row["skip"] == 0:
            assert row["control"] is None
        else:
            nearest = min(abs(skip - row["skip"]) for skip in skips.values())
            assert abs(row["control"]["skip"] - row["skip"]) == nearest
    longest = {few_chunks: (8, 2), many_chunks: (4, 8)}[make]
    assert list(skips) == [
        f"every {every} {unit}"
        for unit, most in zip(("steps", "chunks"), longest, strict=True)
        for every in INTERVALS
        if every <= most
    ]


def test_methods_that_do_not_fit_say_why() -> None:
    figures = compare_methods(*one_chunk(), rounds=1, methods=["teacache", "xcache", "toca"])
    assert [row["name"] for row in figures["rows"]] == ["xcache"]
    assert figures["unfit"].keys() == {"teacache", "toca"}
    assert "modulated" in figures["unfit"]["teacache"]


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        compare_methods(*one_chunk(), rounds=0)
    with pytest.raises(ValueError, match="did you mean 'xcache'"):
        compare_methods(*one_chunk(), methods=["xcahce"])
    with pytest.raises(ValueError, match="returned no tensor"):
        compare_methods(*silent())


def test_a_loop_of_other_noise_at_each_call_is_noticed() -> None:
    assert compare_methods(*noisy(), rounds=1, methods=["xcache"])["noise"] > 0.1


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "new" / "compare.json"
    chosen = ["--method", "fbcache", "--method", "teacache", "--rounds", "1", "--out", str(out)]
    result = CliRunner().invoke(cli.app, ["compare", "tests.holdover.tune.toys:one_chunk", *chosen])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text())["rows"]
    (line,) = (line for line in result.stdout.splitlines() if line.split()[:1] == ["fbcache"])
    assert f"{100 * row['skip']:.1f} %" in line
    assert row["control"]["name"] in line
    assert "teacache does not fit: " in result.stdout

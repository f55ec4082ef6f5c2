"""Calibration, against the same passes recorded by hand and points on known curves."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from typer.testing import CliRunner

import holdover
from holdover import cli
from holdover.methods.teacache import changes, measure_changes
from holdover.tune.calibrate import fit
from tests.holdover.naive.steps import change
from tests.holdover.toy import BLOCKS, MANY, ToyLoop, drive, one_thread
from tests.holdover.tune.toys import few_chunks


def test_changes_are_those_of_the_passes() -> None:
    model, loop = few_chunks()
    with one_thread(), holdover.attach(model, measure_changes()) as cache:
        loop(cache)
        snapshot = cache.snapshot()
        assert cache.stats().reused == 0
    seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {"": [], "uncond": []}
    entered: list[Tensor] = []

    def record(fields: dict[str, Any], run: Any) -> Tensor:
        def apply(block: int, x: Tensor, compute: Any) -> Tensor:
            y: Tensor = compute(x)
            if block == 0:
                entered.append(compute.modulated(x))
            if block == BLOCKS - 1:
                seen[fields["branch"]].append((fields["index"], entered[-1], y))
            return y

        return run(apply=apply)

    by_hand = ToyLoop(sigmas=MANY, branches=("", "uncond"))
    with one_thread():
        for action in drive(2):
            by_hand.step(model, action, record)
    for branch, passes in seen.items():
        expected = [
            (change(now, then), change(y, y_then))
            for (_, then, y_then), (index, now, y) in pairwise(passes)
            if index > 0
        ]
        assert len(expected) == 2 * (len(MANY) - 1)
        np.testing.assert_allclose(changes(snapshot, branch), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="no changes of branch 'cond', branches that ran are: '', 'uncond'"):
        changes(snapshot, "cond")


def test_points_on_a_polynomial_give_it_back() -> None:
    coefficients = [300.0, -40.0, 2.0, 0.01]
    pairs = [(x, float(np.polyval(coefficients, x))) for x in np.linspace(0.01, 0.2, 12)]
    assert fit(pairs, 3) == pytest.approx(coefficients, rel=1e-6)
    assert fit(pairs, 4) == pytest.approx([0.0, *coefficients], abs=1e-4)
    line = [(1.0, 3.0), (2.0, 5.0), (2.0, 5.5), (2.0, 4.5)]
    assert fit(line, 1) == pytest.approx([2.0, 1.0])
    with pytest.raises(ValueError, match="degree=2 cannot be fitted to 2 different changes"):
        fit(line, 2)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["calibrate", *arguments])


def test_a_factory_of_ones_own_is_calibrated(tmp_path: Path) -> None:
    out = tmp_path / "new" / "calibration.json"
    result = run("tests.holdover.tune.toys:few_chunks", "--degree", "2", "--out", str(out))
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["points"] == 2 * (len(MANY) - 1)
    model, loop = few_chunks()
    with holdover.attach(model, measure_changes()) as cache:
        loop(cache)
        moved, output_moved = np.array(changes(cache.snapshot())).T
    assert figures["teacache"]["polynomial"] == pytest.approx(np.polyfit(moved, output_moved, 2), rel=1e-3)
    for name in ("teacache", "magcache"):
        with holdover.attach(model, holdover.policy(name, **figures[name])) as cache:
            loop(cache)
            assert cache.stats().reused > 0

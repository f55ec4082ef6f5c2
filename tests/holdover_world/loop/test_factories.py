"""The loops that `holdover calibrate`, `overhead` and `compare` run on the world model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import holdover
from holdover.tune.calibrate import measured_changes
from holdover.tune.compare import compare_methods
from holdover_world.loop import factories, scenarios
from holdover_world.model.transformer import WorldModel


@pytest.fixture
def driving(model: WorldModel, clips: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(scenarios, "shipped_clips", lambda: clips)
    return monkeypatch


@pytest.mark.usefixtures("driving")
def test_the_loop_starts_anew_at_each_call(model: WorldModel) -> None:
    loop = factories.driving(model, steps=4, chunks=5)
    made = []
    for _ in range(2):
        with holdover.attach(model, holdover.never()) as cache:
            made.append(loop(cache))
    assert made[0].shape[:2] == (1, 5)
    assert torch.equal(*made)


@pytest.mark.usefixtures("driving")
def test_the_world_model_is_calibrated(model: WorldModel) -> None:
    points = measured_changes(model, factories.driving(model, steps=8, chunks=2))
    assert len(points) == 2 * (8 - 1)


@pytest.mark.usefixtures("driving")
def test_methods_are_compared_on_the_world_model(model: WorldModel) -> None:
    figures = compare_methods(model, factories.driving(model, steps=4, chunks=8), methods=["xcache"], rounds=1)
    (row,) = figures["rows"]
    assert row["skip"] > 0
    assert row["control"]["name"] == "every 4 chunks"
    assert figures["noise"] == 0


@pytest.mark.parametrize(("make", "steps"), [(factories.teacher, 35), (factories.student, 4)])
def test_a_factory_loads_the_installed_model(
    make: object, steps: int, model: WorldModel, driving: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model.save(tmp_path)
    driving.setattr(factories, "shipped_model", lambda asked: tmp_path if asked == steps else None)
    made, loop = make()  # type: ignore[operator]
    assert isinstance(made, WorldModel)
    assert callable(loop)

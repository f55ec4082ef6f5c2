"""The lab's plans: its figures against counts of the loop's own, and its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holdover.report.environment import environment
from holdover_world.model.transformer import WorldModel
from lab import plans

WINDOW = 4


@pytest.fixture(scope="module")
def found(model: WorldModel, clips: Path) -> dict[str, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        load = plans.load_scenario
        patch.setattr(plans, "load_scenario", lambda name, model, chunks: load(name, model, clips=clips, chunks=chunks))
        return plans.drive(model, "urban", 3 * WINDOW, 1)


def test_a_plan_that_is_kept_holds_all_chunks_but_the_first_of_a_cycle(found: dict[str, dict[str, Any]]) -> None:
    assert [found[arm.name]["held_chunks"] for arm in plans.ARMS] == [0, 0, 9, 0, 0, 9]


def test_a_plan_lets_x_cache_skip_more_and_a_held_window_leaves_it_nothing(
    found: dict[str, dict[str, Any]], model: WorldModel
) -> None:
    layers = model.sizes.layers
    most = (WINDOW - 1) / WINDOW * (layers - 1) / layers
    newest, planned, held = (found[arm.name]["skip"] for arm in plans.ARMS[:3])
    assert newest < planned <= most
    assert held == 0


def test_the_card_has_a_row_for_each_run(found: dict[str, dict[str, Any]], model: WorldModel) -> None:
    said = {"command": "c", "chunks": 12, "events": 1, "dtype": "float32", "on": environment(model)}
    text = plans.card({**said, "drives": {"urban": found}})
    assert all(f"| {arm.name} |" in text for arm in plans.ARMS)

"""A long measurement goes on where it was cut off, unless what it depends on has changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from holdover_world.model.transformer import WorldModel
from lab.cards import Parts


def _never() -> Any:
    raise AssertionError("measured again")


def _cut_off() -> int:
    raise KeyboardInterrupt


def test_what_was_measured_is_not_measured_again(model: WorldModel, tmp_path: Path) -> None:
    parts = Parts(tmp_path, "card", model, seed=1)
    assert parts.get("first", lambda: {"ms": 2.5}) == {"ms": 2.5}
    with pytest.raises(KeyboardInterrupt):
        parts.get("second", _cut_off)

    again = Parts(tmp_path, "card", model, seed=1)
    assert again.get("first", _never) == {"ms": 2.5}
    assert again.get("second", lambda: 3) == 3

    again.clear()
    assert not list(tmp_path.iterdir())
    assert Parts(tmp_path, "card", model, seed=1).get("first", lambda: 7) == 7


def test_what_it_depends_on_counts(model: WorldModel, tmp_path: Path) -> None:
    trained = copy.deepcopy(model)
    with torch.no_grad():
        next(trained.blocks[0].parameters()).add_(1)
    Parts(tmp_path, "card", model, seed=1).get("first", lambda: 1)
    assert Parts(tmp_path, "another", model, seed=1).get("first", lambda: 2) == 2
    assert Parts(tmp_path, "card", model, seed=1).get("first", _never) == 1
    assert Parts(tmp_path, "card", model, seed=2).get("first", lambda: 3) == 3
    assert Parts(tmp_path, "card", trained, seed=2).get("first", lambda: 4) == 4

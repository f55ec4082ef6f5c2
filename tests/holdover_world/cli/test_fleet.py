"""`holdover fleet`: mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray", reason="no Ray; pip install 'holdover-world[fleet]'")
from tests.holdover_world.cli.commands import refused


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("scenarios: []")
    assert "give ['chunks', 'drivers'" in refused("fleet", "run", str(plan))
    assert "there is no policy 'turbo'" in refused("fleet", "run", str(plan), "--policy", "turbo")

"""A new method costs three files: the method, its naive twin, its row in the documentation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import holdover

ROOT = Path(__file__).parents[2]

METHOD = '''"""Every other step (a toy): compute the even steps of a chunk, repeat the output in the odd ones."""

from __future__ import annotations

from holdover.method import Policy
from holdover.methods.parts.guards import Interval, Protection, for_steps
from holdover.methods.parts.predictors import Repeat
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.triggers import Open


def every_other(*, retain: int | float = 0, protection: Protection = "pass") -> Policy:
    """Compute the even steps of a chunk.

    Args:
        retain: first steps that are computed, by number or, as a float, as a share of the steps.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.
    """
    guard = for_steps(retain=retain, last=False, protection=protection) | Interval(2, "steps")
    return Policy(
        name="every_other", spans=ProbeAndTail(0), trigger=Open(guard=guard), predictor=Repeat(), lifetime="chunk"
    )
'''

TWIN = '''"""Every other step, slowly."""

from __future__ import annotations

from typing import Any

from tests.holdover.case import Case
from tests.holdover.naive.steps import TailTwin
from tests.holdover.toy import BLOCKS, MANY


class EveryOther(TailTwin):
    def __init__(self, *, retain: float = 0, **options: Any) -> None:
        super().__init__(**options)
        self.retain = retain

    def decide(self, x: Any, compute: Any) -> tuple[str, dict[str, float]]:
        even = self.now["fields"]["index"] % 2 == 0
        reason = self.forced()
        if reason in (None, "first", "condition") and even:
            reason = "interval"
        return reason or "reuse", {}

    def stand_in(self, x: Any) -> Any:
        return self.now["memory"]["output"].clone()

    def learn(self, y: Any) -> None:
        self.now["memory"]["output"] = y.clone()


def case(**options: Any) -> Case:
    return Case("every_other", EveryOther, options, MANY, {"blocks": BLOCKS})


DEFAULT = case()
CLOSED = case(retain=1.0)
VARIED = [case(retain=0.5, protection="chunk")]
'''


def test_a_method_in_three_files_passes_the_whole_suite(tmp_path: Path) -> None:
    package = tmp_path / "packages" / "holdover" / "src" / "holdover"
    shutil.copytree(Path(holdover.__file__).parent, package)
    for tests in ("__init__.py", "holdover"):
        copy = shutil.copytree if (ROOT / "tests" / tests).is_dir() else shutil.copy
        (tmp_path / "tests").mkdir(exist_ok=True)
        copy(ROOT / "tests" / tests, tmp_path / "tests" / tests)
    (package / "methods" / "every_other.py").write_text(METHOD, encoding="utf-8")
    (tmp_path / "tests" / "holdover" / "naive" / "every_other.py").write_text(TWIN, encoding="utf-8")
    row = [sys.executable, "-m", "holdover", "methods", "--markdown"]
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "COLUMNS": "200"}
    table = subprocess.run(row, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "| `every_other` |" in table
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "methods.md").write_text(f"{table}\n`every_other()`", encoding="utf-8")
    chosen = "every_other or every_method"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    result = subprocess.run(
        [*command, "tests/holdover/conformance"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    assert int(result.stdout.split(" passed")[0].split()[-1]) == 15, result.stdout

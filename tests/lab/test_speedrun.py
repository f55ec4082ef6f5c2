"""The whole training, from clips to an evaluated student, with one step of every stage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from holdover_world.model.transformer import WorldModel
from holdover_world.training.recipes import RECIPES
from holdover_world.training.trainer import read_log
from tests.holdover_world.driving import write_clips

SCRIPT = Path(__file__).parents[2] / "lab" / "speedrun.sh"
FRAMES = 4 * (4 + 4 * 12)  # the longest rollout: a window of context, and twelve of its own


def test_every_stage_runs(tmp_path: Path) -> None:
    out, data = tmp_path / "runs", write_clips(tmp_path / "data", FRAMES)
    given = {"PYTHON": sys.executable, "SIZE": "tiny", "STEPS": "1", "DATA": str(data), "OUT": str(out)}
    done = subprocess.run([SCRIPT], env={**os.environ, **given}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for stage in RECIPES["tiny"]:
        assert len(list(read_log(out / stage))) == 1
    student = WorldModel.load(out / "agree")
    assert student.sizes.channels == 64
    assert set(student.codec.autoencoders) == {"colour", "depth"}
    assert (out / "world.md").is_file()

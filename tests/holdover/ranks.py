"""Two processes that run a model together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_ranks(worker: str, folder: Path, *arguments: str) -> list[Any]:
    """What each of two ranks wrote to ``folder/<rank>.json``; the worker is told its rank, the folder and these."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", worker, str(rank), str(folder), *arguments],
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]

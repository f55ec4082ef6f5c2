"""Ranks that run a model together agree on every decision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

WORKER = """
import json, sys
import torch
import torch.distributed as dist
import holdover
from tests.engine.models import Scale, Stack, reasons

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
model = Stack(Scale(), Scale())
seen = torch.ones(1, 4, 2)
changed = torch.tensor([1.0, -1.0]).expand(1, 4, 2)
policy = holdover.xcache(front_anchors=0, warmup=0)
with holdover.attach(model, policy, process_group=dist.group.WORLD) as cache:
    for chunk, differs in enumerate([None, None, 0, None, 1]):
        with cache.step(chunk=chunk, commits=False):
            model(changed if differs == rank else seen)
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(reasons(cache), file)
dist.barrier()  # a rank that leaves first would take its peer down
dist.destroy_process_group()
"""


def test_what_one_rank_computes_all_compute(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)], cwd=Path(__file__).parents[2], env=environment
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    # Generation 2 looks new to rank 0 alone, and so does 3, which is as before again. Generation 4 does to rank 1.
    assert zero == ["first"] * 2 + ["reuse"] * 2 + ["cosine"] * 4 + ["group"] * 2
    assert one == ["first"] * 2 + ["reuse"] * 2 + ["group"] * 4 + ["cosine"] * 2

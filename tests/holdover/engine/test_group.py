"""Ranks that run a model together agree on every decision."""

from __future__ import annotations

from pathlib import Path

from tests.holdover.ranks import run_ranks

WORKER = """
import json, sys
import torch
import torch.distributed as dist
import holdover
from tests.holdover.engine.models import Scale, Stack, reasons

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
    zero, one = run_ranks(WORKER, tmp_path)
    # ChunkState 2 looks new to rank 0 alone, and so does 3, which is as before again. ChunkState 4 does to rank 1.
    assert zero == ["first"] * 2 + ["reuse"] * 2 + ["cosine"] * 4 + ["group"] * 2
    assert one == ["first"] * 2 + ["reuse"] * 2 + ["group"] * 4 + ["cosine"] * 2

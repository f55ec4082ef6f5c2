"""diffusers' context parallelism: two processes, each with half of the tokens, agree on every decision."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.holdover.ranks import run_ranks

pytest.importorskip("diffusers", reason="needs the extra: pip install 'holdover[diffusers]'")

WORKER = """
import json, sys
import torch
import torch.distributed as dist
import holdover
from tests.holdover.models.models import TINY

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
from diffusers import ContextParallelConfig
torch.accelerator.device_count = lambda: 1  # diffusers divides by it
tiny = TINY[0]
model = tiny.make()
expected = tiny.run(model, 0, frames=2)
policy = holdover.xcache(tau_floor=0.997, margin=1.0)
outputs = []
with holdover.attach(model, policy, view_groups=(), process_group=dist.group.WORLD) as cache:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    for chunk in range(4):
        inputs = tiny.inputs(0, 2, 1, 0)
        if chunk == 2:  # the second latent frame, which is rank 1's half of the tokens, changes
            inputs["hidden_states"][:, :, 1] *= 0.8
        with cache.step(chunk=chunk, commits=False):
            outputs.append(model(**inputs, return_dict=False)[0])
with open(f"{folder}/{rank}.json", "w") as file:
    close = all(torch.allclose(output, expected, atol=1e-4) for output in outputs[:2])
    json.dump({"close": close, "reasons": [d.reason for d in cache.trace]}, file)
dist.barrier()
dist.destroy_process_group()
"""


def test_what_one_rank_computes_all_compute(tmp_path: Path) -> None:
    zero, one = run_ranks(WORKER, tmp_path)
    assert zero["close"]
    assert one["close"]
    # Chunk 2 looks new to rank 1 alone, and so does 3, which is as before again.
    alike = ["warm-up"] * 3 + ["anchor"] + ["reuse"] * 2
    assert zero["reasons"] == alike + (["anchor"] + ["group"] * 2) * 2
    assert one["reasons"] == alike + (["anchor"] + ["cosine"] * 2) * 2

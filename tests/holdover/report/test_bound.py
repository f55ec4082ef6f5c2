"""The bound against Amdahl's law by hand."""

from __future__ import annotations

import pytest

from holdover.decision import Decision
from holdover.report.bound import Saved, amdahl_bound, saved


@pytest.mark.parametrize(
    ("share", "skip", "bound"), [(1, 0.5, 2.0), (0.8, 0.75, 2.5), (0.9, 0, 1.0), (0, 0.7, 1.0), (0.87, 0.714, 2.6398)]
)
def test_amdahl(share: float, skip: float, bound: float) -> None:
    assert amdahl_bound(share, skip) == pytest.approx(bound, rel=1e-4)


def test_amdahl_refuses_what_is_no_share() -> None:
    for share, skip in ((1.2, 0.5), (0.5, -0.1), (1.0, 1.0)):
        with pytest.raises(ValueError, match=r"share|leaves no time"):
            amdahl_bound(share, skip)
    with pytest.raises(ValueError, match=r"block_share \+ rest_share=1\.1"):
        amdahl_bound(0.9, 0.5, rest_share=0.2)


def test_work_beside_the_blocks_counts_where_it_is_left_out() -> None:
    """Ten seconds: eight in blocks, one beside them in the same passes, one in the KV update."""
    assert amdahl_bound(0.8, 0.75, rest_share=0.1, idle=0.75) == pytest.approx(10 / (2 + 0.25 + 1))
    assert amdahl_bound(0.8, 1, rest_share=0.1, idle=1) == pytest.approx(10)


def call(index: int, block: int, reason: str, slot: str | None = None, **fields: object) -> Decision:
    known = {"stream": "a", "branch": "", "chunk": 0, "role": "denoise", "scores": {}, "sigma": None}
    computed = reason not in ("reuse", "window", "step_hold")
    name = f"blocks.{block}" if slot is None else slot
    made = {**known, "index": index, "block": block, "slot": name, "reason": reason, "computed": computed, **fields}
    return Decision(**made)  # type: ignore[arg-type]


def test_what_passes_did_not_do() -> None:
    ran = [call(0, 0, "anchor"), call(0, 1, "reuse"), call(0, 2, "reuse"), call(0, 3, "cosine")]
    written = [call(0, block, "kv update", role="kv_update") for block in range(4)]
    assert saved([*ran, *written]) == Saved(skip=0.5, idle=0.0)
    all_reused = [call(0, block, "reuse") for block in range(4)]  # the pass ran around them
    assert saved(all_reused) == Saved(skip=1.0, idle=0.0)
    part = [call(1, block, "reuse", scores={"recomputed": share}) for block, share in enumerate((0.25, 0.5))]
    assert saved(part) == Saved(skip=0.625, idle=0.5)
    held = [call(2, 0, "reuse", slot=""), call(2, 0, "step_hold"), call(2, 1, "step_hold")]
    computed = [call(0, 0, "interval", slot=""), call(0, 0, "anchor"), call(0, 1, "reuse")]
    assert saved(held) == Saved(skip=1.0, idle=1.0)
    assert saved([*computed, *held]) == Saved(skip=0.75, idle=0.5)
    whole_alone = [call(0, 0, "interval", slot=""), *(call(i, 0, "reuse", slot="") for i in (1, 2, 3))]
    assert saved(whole_alone) == Saved(skip=0.75, idle=0.75)
    window = [call(i, block, "window", chunk=1) for i in range(3) for block in range(2)]
    assert saved(window) == Saved(skip=1.0, idle=1.0)
    assert saved([*computed, *window]) == Saved(skip=3.5 / 4, idle=0.75)
    assert saved([*ran, *(call(0, block, "cosine", branch="uncond") for block in range(4))]).skip == 0.25
    assert saved(written) == Saved(skip=0.0, idle=0.0)

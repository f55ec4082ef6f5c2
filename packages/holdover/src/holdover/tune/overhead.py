"""What a cache costs per pass: where every block is computed, and where every block is reused; timed and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from holdover.method import Policy
from holdover.methods.fbcache import fbcache
from holdover.methods.never import never
from holdover.methods.xcache import xcache
from holdover.tune.counts import count
from holdover.tune.loop import Loop, Pass, Run, run

UNATTACHED = "unattached"


def measure_overhead(
    model: nn.Module, loop: Loop, *, rounds: int = 5, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Time the passes of a loop without a cache and under each policy of `arms`, in turns.

    One more round is run first and not timed, and one last run under each policy is counted by `count`. Timed are the
    denoising passes in which a block can be reused: those after a stream's first chunk or, where the loop runs one
    chunk only, those after the chunk's first step.

    Args:
        model: the model.
        loop: the same passes each time it is called.
        rounds: runs per policy.
        advance: called after each run; there are ``(rounds + 1) * ARMS``.

    Returns:
        rows: per policy its ``name``, the median ``ms_per_pass``, the median ``ratio`` to the same pass without a
            cache, the ``skip`` rate, the ``bytes_held``, whether the loop returned ``identical`` bits, and, over all
            passes of a run, the ``syncs_per_pass`` and ``launches_per_pass`` that the cache adds.
        rounds: as given.
        passes: how many passes of each round were timed.

    Raises:
        ValueError: there are no rounds, or the loop runs a single pass or not the same passes each time.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: give 1 or more")
    first = run(model, loop)
    advance()
    timed, policies = _timed(first.passes), arms(first.passes)
    if not timed:
        raise ValueError("the loop runs one step of one chunk, and nothing can be reused; let it run more of them")
    found: dict[str, list[Run]] = {name: [] for name in policies}
    for number in range(rounds + 1):
        names = list(policies)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if number or name != UNATTACHED:  # the first run was that one
                found[name].append(run(model, loop, policies[name]))
                advance()
    found = {name: runs[-rounds:] for name, runs in found.items()}
    if len({len(each.passes) for runs in found.values() for each in runs} | {len(first.passes)}) > 1:
        raise ValueError("the loop ran different numbers of passes; let it start anew at each call")
    base, counts = found[UNATTACHED], {name: policy and count(model, loop, policy) for name, policy in policies.items()}
    rows = [
        {
            "name": name,
            "ms_per_pass": 1e3 * median(each.passes[n].seconds for each in runs for n in timed),
            "ratio": median(
                each.passes[n].seconds / beside.passes[n].seconds
                for each, beside in zip(runs, base, strict=True)
                for n in timed
            ),
            "skip": runs[0].stats.skip if runs[0].stats else None,
            "bytes_held": runs[0].bytes_held if runs[0].stats else None,
            "syncs_per_pass": each.syncs / each.passes if (each := counts[name]) else None,
            "launches_per_pass": each.launches / each.passes if each else None,
            "identical": all(map(torch.equal, runs[0].output, base[0].output)),
        }
        for name, runs in found.items()
    ]
    return {"rows": rows, "rounds": rounds, "passes": len(timed)}


def arms(passes: Sequence[Pass]) -> Mapping[str, Policy | None]:
    """What is timed: the model alone, then a cache without a gate, with a closed one, and with an open one.

    The gate is X-Cache's where a loop runs several chunks, and FBCache's where it runs one.
    """
    if len({each.chunk for each in passes}) > 1:
        closed = xcache(protection="pass", tau_floor=2.0)
        opened = xcache(protection="pass", tau_floor=-1.0, margin=2.0, tau_dev=float("inf"))
    else:
        closed, opened = fbcache(threshold=0.0), fbcache(threshold=float("inf"))
    return {UNATTACHED: None, "never": never(), "never-hit": closed, "always-hit": opened}


#: How many there are.
ARMS = 4


def _timed(passes: Sequence[Pass]) -> list[int]:
    """The numbers of the passes in which something can be reused."""
    several = len({each.chunk for each in passes}) > 1
    first: dict[str, int] = {}
    for each in passes:
        first.setdefault(each.stream, each.chunk)
    return [
        n
        for n, each in enumerate(passes)
        if each.role == "denoise" and (each.chunk != first[each.stream] if several else each.index > 0)
    ]

"""Which method suits a model and its loop: every method that fits, beside the fixed schedule that skips as much."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import nn

from holdover.method import Policy
from holdover.methods.fixed_interval import fixed_interval
from holdover.methods.registry import method, policies, policy
from holdover.tune.calibrate import fit, measured_changes, measured_ratios
from holdover.tune.loop import Loop, Pass, Run, relative_error, run

#: The baseline and the control, which are no candidates.
LEFT_OUT = ("never", "fixed_interval")
#: Intervals of the fixed schedules.
INTERVALS = (2, 3, 4, 6, 8)
#: The highest degree of TeaCache's polynomial.
DEGREE = 4


def compare_methods(
    model: nn.Module,
    loop: Loop,
    *,
    methods: Sequence[str] = (),
    rounds: int = 3,
    branch: str = "",
    report: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Run a loop without a cache and under every method that fits, with its default options, in turns.

    TeaCache and MagCache are calibrated on the same loop first. The controls are fixed schedules over steps and over
    chunks, as far as the loop has them.

    Args:
        model: the model.
        loop: runs the same chunks each time it is called, and returns the latents or frames that it made.
        methods: names; by default all that are registered.
        rounds: timed runs per policy. One more is run first and not timed.
        branch: the guidance branch that TeaCache and MagCache are calibrated on.
        report: called with the name of what runs next.

    Returns:
        rows: per method its ``name`` and ``policy``, its ``skip`` rate, its ``speedup`` (the median over the rounds of
            the ratio of the seconds in the model's passes), the ``bytes_held``, the relative ``error`` in L2 of the
            loop's output, and its ``control``: the same figures of the fixed schedule whose skip rate is nearest. The
            control of a method that skips nothing is None.
        controls: all fixed schedules.
        noise: the relative error between two runs without a cache.
        unfit: by name, why a method does not fit this model or loop.
        rounds: as given.

    Raises:
        ValueError: there is no such method, there are no rounds, or the loop returns nothing to compare.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: give 1 or more")
    for name in methods:
        method(name)
    wanted = [name for name in methods or policies() if name not in LEFT_OUT]
    unfit: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a method that can reuse nothing has a skip rate of 0
        report("no cache")
        full = [run(model, loop), run(model, loop)]
        noise = relative_error(full[1].output, full[0].output)
        candidates = []
        for name in wanted:
            report(name)
            try:
                arm = _Arm(name, policy(name, **_calibrated(name, model, loop, branch)))
                arm.runs.append(run(model, loop, arm.policy))
            except (ValueError, RuntimeError, TypeError) as error:
                unfit[name] = str(error)
            else:
                candidates.append(arm)
        controls = [*_schedules(full[0].passes)]
        for number in range(rounds + 1):
            report("no cache")
            full.append(run(model, loop))
            for arm in controls if number == 0 else (*candidates, *controls):
                report(arm.name)
                arm.runs.append(run(model, loop, arm.policy))
    fixed = [_figures(arm, full[-rounds:]) for arm in controls]
    rows = [_figures(arm, full[-rounds:]) for arm in candidates]
    for row in rows:
        row["control"] = _nearest(fixed, row["skip"])
    return {"rows": rows, "controls": fixed, "noise": noise, "unfit": unfit, "rounds": rounds}


@dataclass
class _Arm:
    """A policy and its runs, of which the first is a warm-up."""

    name: str
    policy: Policy
    runs: list[Run] = field(default_factory=list)


def _calibrated(name: str, model: nn.Module, loop: Loop, branch: str) -> dict[str, Any]:
    """The options that a method needs for this model and loop."""
    if name == "magcache":
        return {"ratios": measured_ratios(model, loop, branch)}
    if name == "teacache":
        pairs = measured_changes(model, loop, branch)
        return {"polynomial": fit(pairs, min(DEGREE, len({moved for moved, _ in pairs}) - 1))}
    return {}


def _schedules(passes: Sequence[Pass]) -> Iterator[_Arm]:
    """The fixed schedules for a loop of these passes."""
    chunks = len({each.chunk for each in passes})
    steps = max((each.index + 1 for each in passes), default=1)
    for every in INTERVALS:
        if every <= steps:
            made = fixed_interval(every=every, over="steps", span="all", front_anchors=0, warmup=0, protection="pass")
            yield _Arm(f"every {every} steps", made)
    for every in INTERVALS:
        if every <= chunks:
            yield _Arm(f"every {every} chunks", fixed_interval(every=every))


def _nearest(rows: Sequence[dict[str, Any]], skip: float) -> dict[str, Any] | None:
    """The row whose skip rate is nearest; None for a method that skips nothing."""
    return min(rows, key=lambda row: abs(row["skip"] - skip), default=None) if skip else None


def _figures(arm: _Arm, full: Sequence[Run]) -> dict[str, Any]:
    stats = arm.runs[-1].stats
    assert stats is not None
    pairs = zip(full, arm.runs[1:], strict=True)
    return {
        "name": arm.name,
        "policy": repr(arm.policy),
        "skip": stats.skip,
        "speedup": median(without.seconds / cached.seconds for without, cached in pairs),
        "error": relative_error(arm.runs[-1].output, full[-1].output),
        "bytes_held": arm.runs[-1].bytes_held,
    }

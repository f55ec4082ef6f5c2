"""The figures of a run: what the demo and the ablation report of every arm, as plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdover.decision import Decision
from holdover.method import Policy
from holdover.report.bound import amdahl_bound, saved
from holdover.report.decisions import cosine_by_step_and_block, skip_by_block
from holdover_world.loop.scenarios import Scenario
from holdover_world.measure.fidelity import Comparison, compare
from holdover_world.measure.race import Arm, ArmRun, Race
from holdover_world.measure.reaction import EVENTS, Event, Reaction, mean_ratio
from holdover_world.measure.stlpips import StLpips
from holdover_world.measure.timing import Shares, cycles, speedup, spread, timed
from holdover_world.scene.cameras import FPS

#: PSNR over time is given for each second.
INTERVAL = FPS
#: Seconds from the start over which a run is compared with the simulator.
HORIZONS = (1, 2, 5, 20)
_EDGE = 5 * FPS  # the least length of the first and of the last part of a run, in frames


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """How runs are compared.

    Attributes:
        every: SSIM and ST-LPIPS are computed on every n-th frame.
        distance: ST-LPIPS, or None to leave it out.
        events: the events whose reactions are measured.
    """

    every: int
    distance: StLpips | None
    events: Sequence[Event] = EVENTS


def describe(
    race: Race, name: str, scenario: Scenario, metrics: Metrics, reactions: Sequence[Reaction] = ()
) -> dict[str, Any]:
    """The figures of a cached run, against its full-compute reference and, in a scripted scenario, the simulator.

    The keys are those of a policy in ``report.json``. Times, skip and the bound are of the same chunks: those of the
    whole cycles after the first.
    """
    run, reference = race.runs[name], race.reference(name)
    stats = run.stats()
    assert stats is not None, "an arm without a policy is a reference; use describe_full"
    comparison = compare(run.video(), reference.video(), every=metrics.every, distance=metrics.distance)
    base = race.base(name)
    full_time, time, config = _times(base), _times(run), run.loop.model.sizes
    chunks = timed(len(run.exact), run.loop.window_frames)
    decisions = [d for d in run.decisions() if d.chunk in chunks]
    left_out, shares = saved(decisions), base.shares(chunks)
    bound = float(np.median(cycle_bounds(shares, decisions, chunks, run.loop.window_frames)))
    faster = speedup(full_time.dit, time.dit)
    by_block = [d for d in decisions if d.slot]  # and not of the model as a whole
    return {
        "name": name,
        "policy": described(run.arm),
        "skip": left_out.skip,
        "idle": left_out.idle,
        "held_chunks": sum(run.held),
        "block_share": shares.blocks,
        "pass_share": shares.passes,
        "speedup": faster,
        "speedup_spread": [*spread(full_time.dit / time.dit)],
        "speedup_bound": bound,
        "share_of_bound": faster / bound,
        **time.to_json(),
        "end_to_end_speedup": speedup(full_time.end_to_end, time.end_to_end),
        "bytes_held": stats.bytes_held,
        **_fidelity(comparison, config.window * config.frames_per_latent),
        "truth": _truth(run, scenario, metrics),
        "reaction": {event.name: mean_ratio(reactions, event.name) for event in metrics.events},
        "reasons": dict(stats.reasons),
        "skip_by_block": _nullable(skip_by_block(by_block, config.layers)),
        "cosine_by_step_and_block": [
            _nullable(row) for row in cosine_by_step_and_block(by_block, run.loop.config.steps, config.layers)
        ],
        "full_chunks": sum(exact and not held for exact, held in zip(run.exact, run.held, strict=True)),
    }


def cycle_bounds(shares: Shares, decisions: Sequence[Decision], chunks: range, cycle: int) -> NDArray[np.float64]:
    """The speed-up that Amdahl's law allows each timed cycle ``[cycles]``; their median is the bound of the median.

    Cycles differ in what they skip, so their mean skip would bound another number.
    """
    parts = [range(first, first + cycle) for first in range(chunks.start, chunks.stop, cycle)]
    left_out = [saved(d for d in decisions if d.chunk in part) for part in parts]
    rest = shares.passes - shares.blocks
    return np.array([amdahl_bound(shares.blocks, each.skip, rest_share=rest, idle=each.idle) for each in left_out])


def described(arm: Arm) -> str | None:
    """An arm's policies and what its loop holds, as text; None for full compute."""
    if arm.policy is None:
        return None
    policies = [arm.policy] if isinstance(arm.policy, Policy) else arm.policy
    return " + ".join([*map(repr, [arm.loop.hold_window] if arm.loop.hold_window else []), *map(repr, policies)])


def describe_full(run: ArmRun, scenario: Scenario, metrics: Metrics, *, name: str = "full") -> dict[str, Any]:
    """The figures of a run that computes everything. It is its own reference, so its fidelity is perfect."""
    perfect = {"psnr_db": None, "ssim": 1.0, "lpips": 0.0}
    return {
        "name": name,
        "policy": None,
        "skip": 0.0,
        "idle": 0.0,
        "held_chunks": 0,
        "speedup": 1.0,
        "speedup_spread": [1.0, 1.0],
        "speedup_bound": 1.0,
        "share_of_bound": 1.0,
        **_times(run).to_json(),
        "end_to_end_speedup": 1.0,
        "bytes_held": 0,
        "stitched": perfect,
        "cameras": dict.fromkeys(run.frames, perfect),
        "truth": _truth(run, scenario, metrics),
        "reaction": {event.name: 1.0 for event in metrics.events},
        "reasons": {},
        "full_chunks": len(run.exact),
    }


@dataclass(frozen=True, kw_only=True)
class _Times:
    dit: NDArray[np.float64]  # mean seconds of a chunk, for each whole cycle after the first
    end_to_end: NDArray[np.float64]

    def to_json(self) -> dict[str, Any]:
        return {
            "cycles_timed": len(self.dit),
            "dit_ms_per_chunk": 1e3 * float(np.median(self.dit)),
            "dit_ms_per_chunk_spread": [*spread(1e3 * self.dit)],
            "dit_ms_per_chunk_mean": 1e3 * float(self.dit.mean()),
            "end_to_end_ms_per_chunk": 1e3 * float(np.median(self.end_to_end)),
            "end_to_end_ms_per_chunk_spread": [*spread(1e3 * self.end_to_end)],
        }


def _times(run: ArmRun) -> _Times:
    cycle = run.loop.window_frames
    return _Times(
        dit=cycles(np.array(run.dit_seconds), cycle), end_to_end=cycles(np.array(run.end_to_end_seconds), cycle)
    )


def _fidelity(comparison: Comparison, window_frames: int) -> dict[str, Any]:
    cameras = [view for view in comparison.errors if view != "stitched"]
    first, last = comparison.psnr_at_ends(window_frames, _EDGE)
    return {
        "stitched": comparison.fidelity().to_json(),
        "cameras": {camera: comparison.fidelity(camera).to_json() for camera in cameras},
        "psnr_db_first": finite(first),
        "psnr_db_last": finite(last),
        "psnr_db_by_window": [finite(value) for value in comparison.psnr_by(window_frames)],
        "psnr_db_by_second": [finite(value) for value in comparison.psnr_by(INTERVAL)],
    }


def _truth(run: ArmRun, scenario: Scenario, metrics: Metrics) -> dict[str, Any] | None:
    """The fidelity to the simulator, if the scenario has its frames."""
    if scenario.truth is None:
        return None
    comparison = compare(run.video(), scenario.truth, every=metrics.every)
    return {
        "psnr_db": finite(comparison.psnr()),
        "ssim": comparison.ssim["stitched"],
        "psnr_db_by_horizon": {
            str(seconds): finite(comparison.psnr(frames=slice(seconds * FPS)))
            for seconds in HORIZONS
            if seconds * FPS <= len(comparison.errors["stitched"])
        },
    }


def finite(value: float) -> float | None:
    """The value for JSON: None for infinity and NaN."""
    return value if math.isfinite(value) else None


def _nullable(values: NDArray[np.float64]) -> list[float | None]:
    return [finite(float(value)) for value in values]

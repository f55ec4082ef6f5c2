"""A run of a race as figures: what the demo and the ablation report of every arm, as JSON-ready dictionaries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdover.report.bound import amdahl_bound
from holdover.report.decisions import cosine_by_step_and_block, skip_by_block
from holdover_world.loop.scenarios import Scenario
from holdover_world.measure.fidelity import Comparison, compare
from holdover_world.measure.race import ArmRun, Race
from holdover_world.measure.reaction import EVENTS, Event, Reaction, mean_ratio
from holdover_world.measure.stlpips import StLpips
from holdover_world.measure.timing import cycles, speedup
from holdover_world.scene.cameras import FPS

#: PSNR over time is that of each second.
INTERVAL = FPS
#: Seconds from the start over which a rollout is compared with the simulator.
HORIZONS = (1, 2, 5, 20)
_EDGE = 5 * FPS  # frames that the first and the last windows of a run span at least


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """How runs are compared.

    Attributes:
        every: SSIM and ST-LPIPS look at every so-manieth frame.
        distance: ST-LPIPS, or None to leave it out.
        block_shares: per cadence, of the DiT time without a cache, what the blocks of denoising passes take.
        events: those to which reactions are measured.
    """

    every: int
    distance: StLpips | None
    block_shares: Mapping[str, float]
    events: Sequence[Event] = EVENTS


def describe(
    race: Race, name: str, scenario: Scenario, metrics: Metrics, reactions: Sequence[Reaction] = ()
) -> dict[str, Any]:
    """The figures of one cached run, against its full-compute reference and, where there is one, the simulator.

    The keys are those of a policy in ``report.json``.
    """
    lane, reference = race.lanes[name], race.reference(name)
    stats = lane.stats()
    assert stats is not None, "an arm without a policy is a reference; describe_full takes it"
    comparison = compare(lane.video(), reference.video(), every=metrics.every, distance=metrics.distance)
    full_time, time = _times(race.base(name)), _times(lane)
    config = lane.loop.model.sizes
    bound = amdahl_bound(metrics.block_shares[lane.loop.config.cadence], stats.skip)
    faster = speedup(full_time.dit, time.dit)
    decisions = lane.decisions()
    return {
        "name": name,
        "policy": repr(lane.arm.policy),
        "skip": stats.skip,
        "speedup": faster,
        "speedup_bound": bound,
        "share_of_bound": faster / bound,
        **time.to_json(),
        "end_to_end_speedup": speedup(full_time.end_to_end, time.end_to_end),
        "bytes_held": stats.bytes_held,
        **_fidelity(comparison, config.window * config.frames_per_latent),
        "truth": _truth(lane, scenario, metrics),
        "reaction": {event.name: mean_ratio(reactions, event.name) for event in metrics.events},
        "reasons": dict(stats.reasons),
        "skip_by_block": _nullable(skip_by_block(decisions, config.layers)),
        "cosine_by_step_and_block": [
            _nullable(row) for row in cosine_by_step_and_block(decisions, lane.loop.config.steps, config.layers)
        ],
        "full_chunks": sum(lane.exact),
    }


def describe_full(lane: ArmRun, scenario: Scenario, metrics: Metrics, *, name: str = "full") -> dict[str, Any]:
    """The figures of the run that computes everything; against itself it is perfect by definition."""
    perfect = {"psnr_db": None, "ssim": 1.0, "lpips": 0.0}
    return {
        "name": name,
        "policy": None,
        "skip": 0.0,
        "speedup": 1.0,
        "speedup_bound": 1.0,
        "share_of_bound": 1.0,
        **_times(lane).to_json(),
        "end_to_end_speedup": 1.0,
        "bytes_held": 0,
        "stitched": perfect,
        "cameras": dict.fromkeys(lane.frames, perfect),
        "truth": _truth(lane, scenario, metrics),
        "reaction": {event.name: 1.0 for event in metrics.events},
        "reasons": {},
        "full_chunks": len(lane.exact),
    }


@dataclass(frozen=True, kw_only=True)
class _Times:
    dit: NDArray[np.float64]  # mean seconds of a chunk, per whole cycle after the first
    end_to_end: NDArray[np.float64]

    def to_json(self) -> dict[str, float]:
        return {
            "dit_ms_per_chunk": 1e3 * float(np.median(self.dit)),
            "dit_ms_per_chunk_mean": 1e3 * float(self.dit.mean()),
            "end_to_end_ms_per_chunk": 1e3 * float(np.median(self.end_to_end)),
        }


def _times(lane: ArmRun) -> _Times:
    cycle = lane.loop.window_frames
    return _Times(
        dit=cycles(np.array(lane.dit_seconds), cycle), end_to_end=cycles(np.array(lane.end_to_end_seconds), cycle)
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


def _truth(lane: ArmRun, scenario: Scenario, metrics: Metrics) -> dict[str, Any] | None:
    """Against what the simulator showed: how good the model is, cached or not."""
    if scenario.truth is None:
        return None
    comparison = compare(lane.video(), scenario.truth, every=metrics.every)
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
    """As JSON has it: None where it is infinite or no number."""
    return value if math.isfinite(value) else None


def _nullable(values: NDArray[np.float64]) -> list[float | None]:
    return [finite(float(value)) for value in values]

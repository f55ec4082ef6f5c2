"""Every method on the world model at several settings, each beside the fixed interval that computes as many passes."""

from __future__ import annotations

import gc
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import Progress

from holdover.decision import Decision
from holdover.engine.attach import attach
from holdover.method import Policy
from holdover.methods.magcache import magnitude_ratios, measure_magnitudes
from holdover.methods.teacache import changes, measure_changes
from holdover.report.bound import amdahl_bound
from holdover.report.environment import environment
from holdover.report.progress import bar
from holdover.tune.calibrate import fit
from holdover_world.cli.common import Clips, Model, Seed, load, show
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.scenarios import Scenario, load_scenario
from holdover_world.measure.cards import write_card
from holdover_world.measure.fidelity import compare, depth_errors
from holdover_world.measure.race import Arm, Race
from holdover_world.measure.stlpips import StLpips
from holdover_world.measure.timing import clock_blocks, cycles, speedup
from holdover_world.model.transformer import WorldModel
from lab.cards import LAB, Out, Parts, run_script
from lab.methods_card import card
from lab.methods_settings import FEW, Setting, by_cadence, settings
from lab.plots import plot_fronts

#: The scenario that is driven, and the one that methods are calibrated on, with another seed.
SCENARIO, CALIBRATION = "urban", "highway"
#: Of TeaCache's polynomial. The changes of four noise levels form three clusters; a higher degree overfits them.
DEGREE = 2
#: How many runs are raced together. Each has its own copy of the model.
HEAT = 8


def run_methods(
    model: WorldModel,
    out: Path,
    *,
    steps: int = FEW,
    chunks: int | None = None,
    seed: int = 0,
    every: int = 12,
    clips: Path | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Drive all methods; writes ``methods-<steps>.md``, ``.json`` and ``.png``.

    An interrupted measurement continues with the runs it was in.

    Args:
        steps: denoising passes of a chunk: 4, or 12 and more.
        chunks: to drive, with the first cycle, which is warm-up; None for 12 at four steps, 8 at many.
        seed: of the noise; the calibration takes the next one.
        every: SSIM and ST-LPIPS are taken of every N-th frame.
        clips: where the scenarios start.

    Raises:
        ValueError: there are no settings for ``steps``, or ``chunks`` has no whole cycle after the warm-up.
    """
    left_out = settings(steps)[1]
    chunks = chunks or (12 if steps == FEW else 8)
    if chunks < 2 * model.sizes.window:
        raise ValueError(f"chunks={chunks} has no cycle after the warm-up; give {2 * model.sizes.window}")
    scenario = load_scenario(SCENARIO, model, clips=clips, chunks=chunks)
    elsewhere = load_scenario(CALIBRATION, model, clips=clips, chunks=model.sizes.window)
    distance = StLpips()
    cadences = by_cadence(steps)
    heats = {cadence: _heats(some) for cadence, some in cadences.items()}
    name = f"methods-{steps}"
    parts = Parts(out, name, model, clips=str(clips), chunks=chunks, seed=seed, every=every)
    total = sum(map(len, heats.values())) * chunks
    task = progress.add_task(f"methods at {steps} steps", total=total)
    results: dict[str, dict[str, Any]] = {}
    calibrations: dict[str, Any] = {}
    done = 0
    for cadence in cadences:
        loop = LoopConfig.of_steps(steps, cadence)
        progress.update(task, description=f"{steps} steps, {cadence}: calibration")
        needed = any(setting.calibrated for setting in cadences[cadence])
        calibration = calibrate(model, elsewhere, loop, seed=seed + 1) if needed else {}
        shares = parts.get(f"{cadence}: shares", partial(_shares, model, elsewhere, loop))
        progress.update(task, description=f"{steps} steps, {cadence}")
        run = partial(
            _run, model, scenario, loop, calibration, seed=seed, shares=shares, every=every, distance=distance
        )
        found = []
        for heat in heats[cadence]:
            measure = partial(run, heat, advance=lambda: progress.advance(task))
            found.append(parts.get(f"{cadence}: {', '.join(setting.name for setting in heat)}", measure))
            done += chunks
            progress.update(task, completed=done)
        rows = [row for heat in found for row in heat["rows"]]
        beside_controls(rows)
        calibrations[cadence] = calibration
        full_ms = median(heat["full_dit_ms"] for heat in found)
        results[cadence] = {"rows": rows, "full_dit_ms": full_ms, "block_shares": shares}
    figures = {
        "steps": steps,
        "chunks": chunks,
        "seed": seed,
        "every": every,
        "cadences": results,
        "calibration": calibrations,
        "left_out": left_out,
        "environment": environment(model),
    }
    write_card(out, name, card(figures), figures)
    plot_fronts(out / f"{name}.png", {cadence: fronts(result["rows"]) for cadence, result in results.items()})
    parts.clear()
    return figures


def _run(
    model: WorldModel,
    scenario: Scenario,
    loop: LoopConfig,
    calibration: Mapping[str, Mapping[str, Any]],
    heat: Sequence[Setting],
    *,
    seed: int,
    shares: Mapping[str, float],
    every: int,
    distance: StLpips,
    advance: Callable[[], None],
) -> dict[str, Any]:
    arms = [Arm(name=s.name, policy=s.policy(loop.cadence, calibration), loop=loop) for s in heat]
    gc.collect()  # a run and the hook on its model refer to each other; only the collector frees their memory
    with Race(model, scenario, arms, seed=seed) as race, warnings.catch_warnings():
        # One of the results: a method may find nothing to reuse here.
        warnings.filterwarnings("ignore", message=".*could reuse nothing")
        for action in scenario.actions:
            race.step(action)
            advance()
        rows = [describe(race, setting, shares, every=every, distance=distance) for setting in heat]
        base = race.base(heat[0].name)
        full_ms = 1e3 * float(np.median(cycles(np.array(base.dit_seconds), base.loop.window_frames)))
    return {"rows": rows, "full_dit_ms": full_ms}


def calibrate(model: WorldModel, scenario: Scenario, loop: LoopConfig, *, seed: int) -> dict[str, dict[str, Any]]:
    """The calibrated options of TeaCache and MagCache, by method, from a run of a scenario under a cadence."""

    def measured(measuring: Policy) -> Any:
        with attach(model, measuring) as cache:
            start = scenario.start, scenario.start_actions
            closed = ClosedLoop(model, *start, config=loop, seed=seed, cache=cache, track=scenario.track)
            for action in scenario.actions:
                closed.step(action)
            return cache.snapshot()

    return {
        "teacache": {"polynomial": tuple(fit(changes(measured(measure_changes())), DEGREE))},
        "magcache": {"ratios": magnitude_ratios(measured(measure_magnitudes()))},
    }


def describe(
    race: Race, setting: Setting, shares: Mapping[str, float], *, every: int, distance: StLpips | None
) -> dict[str, Any]:
    """The figures of one run against full compute; counts and times leave the first cycle out."""
    run, base = race.runs[setting.name], race.base(setting.name)
    fidelity = compare(run.video(), base.video(), every=every, distance=distance).fidelity()
    draws_depth = "depth" in base.loop.model.sizes.modalities
    cycle = run.loop.window_frames
    full, skip = count(run.decisions(), first=cycle, chunks=len(run.exact) - cycle)
    stats, level = run.stats(), run.arm.policy.level if isinstance(run.arm.policy, Policy) else "block"
    assert stats is not None
    return {
        "name": setting.name,
        "method": setting.method,
        "over": setting.over,
        "every": setting.options.get("every"),
        "policy": repr(run.arm.policy),
        **fidelity.to_json(),
        "depth": depth_errors(_flat(run.depth()), _flat(base.depth())) if draws_depth else None,
        "full_per_chunk": full,
        "skip": skip,
        "speedup": _speedup(base.dit_seconds, run.dit_seconds, cycle),
        # An attention call and an MLP call cost differently, so the share of calls gives no bound.
        "speedup_bound": amdahl_bound(shares[level], skip) if level in shares else None,
        "end_to_end_speedup": _speedup(base.end_to_end_seconds, run.end_to_end_seconds, cycle),
        "bytes_held": stats.bytes_held,
    }


def _flat(video: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([frames.ravel() for frames in video.values()])


def count(decisions: Iterable[Decision], *, first: int, chunks: int) -> tuple[float, float]:
    """The FULL passes per chunk, in which every call is computed, and the share of calls that are not.

    Args:
        decisions: of one run.
        first: the first chunk that counts.
        chunks: how many chunks count.
    """
    passes: dict[tuple[int, int], list[bool]] = defaultdict(list)
    for decision in decisions:
        if decision.role == "denoise" and decision.chunk >= first:
            passes[decision.chunk, decision.index].append(decision.computed)
    calls = [computed for each in passes.values() for computed in each]
    return sum(map(all, passes.values())) / chunks, calls.count(False) / len(calls)


def beside_controls(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each method's row what the fixed interval along its axis does with as many FULL passes.

    PSNR in dB, skip and speed-up are interpolated between the intervals with the next fewer and the next more FULL
    passes; ``gain_db`` is the method's PSNR minus theirs. None where there is no such pair, or no PSNR.
    """
    controls = [row for row in rows if row["method"] == "fixed_interval" and row["psnr_db"] is not None]
    for row in rows:
        row["control"] = None
        full = row["full_per_chunk"]
        same = [control for control in controls if control["over"] == row["over"]]
        fewer = [control for control in same if control["full_per_chunk"] <= full]
        more = [control for control in same if control["full_per_chunk"] >= full]
        if row["method"] in ("never", "fixed_interval") or not (fewer and more):
            continue
        low = max(fewer, key=lambda control: control["full_per_chunk"])
        high = min(more, key=lambda control: control["full_per_chunk"])
        apart = high["full_per_chunk"] - low["full_per_chunk"]
        share = (full - low["full_per_chunk"]) / apart if apart else 0.0
        mixed = {key: (1 - share) * low[key] + share * high[key] for key in ("psnr_db", "skip", "speedup")}
        row["control"] = {
            "every": sorted({low["every"], high["every"]}),
            **mixed,
            "gain_db": None if row["psnr_db"] is None else row["psnr_db"] - mixed["psnr_db"],
        }


def fronts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Per method (speed-up, PSNR in dB) of its settings, the fastest last, without those equal to full compute."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["psnr_db"] is not None:
            control = row["method"] == "fixed_interval"
            points[f"every N {row['over']}" if control else row["method"]].append((row["speedup"], row["psnr_db"]))
    return {method: sorted(found) for method, found in points.items()}


def _heats(chosen: Sequence[Setting]) -> list[Sequence[Setting]]:
    return [chosen[first : first + HEAT] for first in range(0, len(chosen), HEAT)]


def _shares(model: WorldModel, scenario: Scenario, loop: LoopConfig) -> dict[str, float]:
    """By level, the share of the DiT time without a cache that can be skipped: blocks, or whole denoising passes."""
    closed = ClosedLoop(model, scenario.start, scenario.start_actions, config=loop, track=scenario.track)
    with clock_blocks(model) as blocks, clock_blocks(model, whole=True) as passes:
        total = sum(piece.dit_seconds for piece in closed.run(scenario.actions))
    return {"block": blocks.seconds / total, "model": passes.seconds / total}


def _speedup(full: Sequence[float], other: Sequence[float], cycle: int) -> float:
    return speedup(cycles(np.array(full), cycle), cycles(np.array(other), cycle))


def main(
    out: Out = LAB,
    model: Model = None,
    clips: Clips = None,
    steps: Annotated[int, typer.Option(help="Denoising passes: 4, as trained, or many, such as 35.")] = FEW,
    chunks: Annotated[int | None, typer.Option(help="To drive. By default 12; of many steps 8.")] = None,
    seed: Seed = 0,
) -> None:
    """Every method at several settings, each beside the fixed interval that computes as many passes."""
    with bar() as progress:
        figures = run_methods(
            load(model, steps)[0], out, steps=steps, chunks=chunks, seed=seed, clips=clips, progress=progress
        )
    show(out / f"methods-{steps}.md", figures)


if __name__ == "__main__":
    run_script(main)

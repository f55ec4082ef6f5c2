"""Scripted drives with and without a plan: X-Cache, the held window, `frontier` and `step_hold`, beside full compute.

    python -m lab.plans

Every run is compared with full compute that is told the same. Writes ``plans.md`` and ``plans.json``. An interrupted
measurement continues with the drive it was in.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer

from holdover.methods.registry import policy
from holdover.report.environment import environment
from holdover.report.progress import bar
from holdover.report.tables import markdown
from holdover_world.cli.common import show
from holdover_world.loop.config import HoldWindow, LoopConfig
from holdover_world.loop.scenarios import KINDS, load_scenario, shipped_model
from holdover_world.measure.cards import about, write_card
from holdover_world.measure.fidelity import compare
from holdover_world.measure.figures import HORIZONS
from holdover_world.measure.race import Arm, ArmRun, Race
from holdover_world.measure.reaction import EVENTS, mean_ratio, moments, run_race
from holdover_world.measure.timing import cycles, speedup
from holdover_world.model.transformer import WorldModel
from holdover_world.runtime import keep_memory
from holdover_world.scene.cameras import FPS
from lab.cards import LAB, Out, Parts, run_script

#: Every run commits the window of a cycle's first chunk. With `step_hold`, passes of that chunk are held as well.
ARMS = (
    Arm(name="xcache, newest held", policy=policy("xcache")),
    Arm(name="xcache, oracle plan", policy=policy("xcache"), plan="oracle"),
    Arm(
        name="held window, oracle plan",
        policy=policy("xcache"),
        plan="oracle",
        loop=LoopConfig(hold_window=HoldWindow()),
    ),
    Arm(name="frontier, newest held", policy=policy("frontier")),
    Arm(name="frontier + step_hold, newest held", policy=(policy("step_hold"), policy("frontier"))),
    Arm(
        name="held window + step_hold, oracle plan",
        policy=policy("step_hold"),
        plan="oracle",
        loop=LoopConfig(hold_window=HoldWindow()),
    ),
)


def drive(model: WorldModel, name: str, chunks: int, events: int) -> dict[str, Any]:
    """The figures of every arm on one scripted drive; ``events`` is at how many moments reactions are measured."""
    scenario = load_scenario(name, model, chunks=chunks)
    window = model.sizes.window
    with Race(model, scenario, ARMS) as race:
        at = moments(scenario.actions, window, events)
        reactions = run_race(race, scenario.actions, at=at, advance=lambda: None)
        found = {}
        for arm in ARMS:
            run, full = race.runs[arm.name], race.base(arm.name)
            per = model.sizes.frames_per_latent
            comparison = compare(run.video(), full.video(), every=chunks * per)
            timed = [cycles(np.array(each.dit_seconds), window) for each in (full, run)]
            stats = run.stats()
            assert stats is not None
            found[arm.name] = {
                "dit_speedup": speedup(*timed),
                "dit_ms_full": 1e3 * float(np.median(timed[0])),
                "dit_ms": 1e3 * float(np.median(timed[1])),
                "skip": _skip(run, window),
                "held_chunks": stats.held_chunks,
                "bytes_held": stats.bytes_held,
                "psnr": comparison.psnr(),
                "psnr_by_window": comparison.psnr_by(window * per),
                "truth": _truth(run, scenario.truth, per),
                "truth_full": _truth(full, scenario.truth, per),
                "response": {event.name: mean_ratio(reactions[arm.name], event.name) for event in EVENTS},
            }
    gc.collect()  # a run and the hook on its model refer to each other; only the collector frees their memory
    return found


def _skip(run: ArmRun, window: int) -> float | None:
    """The share of block calls that were reused in the cycles that are timed; None where no pass ran in full."""
    calls = [d for d in run.decisions() if d.role == "denoise" and d.chunk >= window and d.reason != "window"]
    return sum(d.reused for d in calls) / len(calls) if calls else None


def _truth(run: ArmRun, truth: Mapping[str, Any] | None, per: int) -> dict[str, float]:
    """PSNR against the simulator from the start over so many seconds."""
    assert truth is not None
    comparison, frames = compare(run.video(), truth, every=len(run.exact) * per), len(run.exact) * per
    return {
        str(seconds): comparison.psnr(frames=slice(seconds * FPS)) for seconds in HORIZONS if seconds * FPS <= frames
    }


def card(figures: dict[str, Any]) -> str:
    """The Markdown of a result."""
    parts = [
        f"""# Scripted drives with and without a plan

`{figures["command"]}`: {figures["chunks"]} chunks of each drive in {figures["dtype"]}.
All runs of a drive are interleaved. Each is compared with full compute that is told the same. An oracle plan is one
that is always kept. DiT time: medians of whole cycles after the first, KV update included. Skip is of the block calls
of these cycles that a pass asked. PSNR is of the stitched view against full compute, over all and in the worst window.
"Simulator" is PSNR against the recording, from the start over the seconds named, and in brackets that of full compute.
Responses are in the event's own chunk. They are measured at up to {figures["events"]} moments of a drive.
"""
    ]
    for name, found in figures["drives"].items():
        rows = [
            (
                arm,
                f"{each['dit_speedup']:.2f}×",
                f"{each['dit_ms']:.0f} of {each['dit_ms_full']:.0f}",
                "–" if each["skip"] is None else f"{100 * each['skip']:.1f} %",
                str(each["held_chunks"]),
                f"{each['bytes_held'] / 1e6:.0f}",
                f"{each['psnr']:.2f}",
                f"{min(each['psnr_by_window']):.1f}",
                " ".join(f"{each['truth'][s]:.2f} ({full:.2f})" for s, full in each["truth_full"].items()),
                *("–" if ratio is None else f"{ratio:.3f}" for ratio in each["response"].values()),
            )
            for arm, each in found.items()
        ]
        seconds = ", ".join(next(iter(found.values()))["truth_full"])
        times = "DiT", "ms a chunk", "skip", "chunks held", "MB held"
        header = ("run", *times, "PSNR", "worst", f"simulator, {seconds} s", *(event.name for event in EVENTS))
        parts.append(f"## {name}\n\n{markdown(header, rows)}")
    return "\n".join([*parts, about(figures["on"]), ""])


def main(
    out: Out = LAB,
    chunks: Annotated[int, typer.Option(help="Per drive, a third of a second each.")] = 60,
    events: Annotated[int, typer.Option(help="Moments of a drive at which reactions are measured.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Scripted drives with and without a plan."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype} is not float32 or bfloat16")
    keep_memory()
    model = WorldModel.load(shipped_model(), dtype=getattr(torch, dtype))
    if chunks < 2 * model.sizes.window:
        raise ValueError(f"--chunks {chunks} is less than two windows; give at least {2 * model.sizes.window}")
    parts, drives = Parts(out, "plans", model, chunks=chunks, events=events, dtype=dtype), {}
    with bar() as progress:
        for name in progress.track(KINDS, description="drives"):
            drives[name] = parts.get(name, partial(drive, model, name, chunks, events))
    figures = {
        "command": f"python -m lab.plans --chunks {chunks} --events {events} --dtype {dtype}",
        "chunks": chunks,
        "events": events,
        "dtype": dtype,
        "drives": drives,
        "on": environment(model, shipped_model()),
    }
    write_card(out, "plans", card(figures), figures)
    parts.clear()
    show(out / "plans.md", figures)


if __name__ == "__main__":
    run_script(main)

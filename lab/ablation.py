"""What each part of X-Cache contributes, which cadence it needs, and whether it beats the plain cadence."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import Progress, TaskID

from holdover.methods.registry import policy
from holdover.report.environment import environment
from holdover.report.fidelity import psnr
from holdover.report.progress import bar
from holdover_world.cli.common import Clips, Model, Seed, load, show
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.scenarios import KINDS, Scenario, load_scenario
from holdover_world.measure.cards import write_card
from holdover_world.measure.figures import Metrics, describe, describe_full, finite
from holdover_world.measure.race import Arm, Race
from holdover_world.measure.reaction import moments, run_race
from holdover_world.measure.stlpips import StLpips
from holdover_world.model.transformer import WorldModel
from lab.ablation_card import card
from lab.cards import LAB, Out, Parts, run_script

#: One scripted and one steady scenario; the published ablation used a highway clip.
SCENARIOS = ("highway", "urban-steady")
CHUNKS = 60  # 20 seconds
MOMENTS = 2

WINDOW, PLAIN, FRESH = LoopConfig(), LoopConfig(cadence="plain"), LoopConfig(fresh_noise=True)
LAST_FULL, EMITTED = LoopConfig(commit="last_full"), LoopConfig(commit="emitted")
LAST_PROTECTED = LoopConfig(protected="last", commit="last_full")


def ablation_arms() -> list[Arm]:
    """Every row of the ablation."""
    rows: list[tuple[str, LoopConfig, str, dict[str, Any]]] = [
        ("default", WINDOW, "xcache", {}),
        ("+ step-0 protection", WINDOW, "xcache", {"step0": "full"}),
        ("+ step-0 protection, relaxed", WINDOW, "xcache", {"step0": "relaxed"}),
        ("− KV protection", WINDOW, "xcache", {"protection": "pass"}),
        ("− KV protection + step-0", WINDOW, "xcache", {"protection": "pass", "step0": "full"}),
        ("− front anchor", WINDOW, "xcache", {"front_anchors": 0}),
        ("− deviation test", WINDOW, "xcache", {"tau_dev": float("inf")}),
        *((f"floor {floor}", WINDOW, "xcache", {"tau_floor": floor}) for floor in (0.90, 0.95, 0.98)),
        ("last protected", LAST_PROTECTED, "xcache", {}),
        ("commit last full", LAST_FULL, "xcache", {}),
        ("commit emitted", EMITTED, "xcache", {}),
        ("commit emitted − KV protection", EMITTED, "xcache", {"protection": "pass"}),
        ("fresh noise", FRESH, "xcache", {}),
        ("plain cadence", PLAIN, "xcache", {}),
        ("plain cadence − KV protection", PLAIN, "xcache", {"protection": "pass"}),
        ("reactive", LAST_FULL, "xcache_reactive", {}),
        ("fixed, every 2nd", WINDOW, "fixed_interval", {"every": 2}),
        ("fixed, every 4th", WINDOW, "fixed_interval", {"every": 4}),
    ]
    full = [
        Arm(name="full"),
        Arm(name="full, fresh noise", loop=FRESH),
        Arm(name="full, plain cadence", loop=PLAIN),
    ]
    return full + [Arm(name=name, loop=loop, policy=policy(method, **options)) for name, loop, method, options in rows]


def control_arms() -> list[Arm]:
    """The window cadence with a cache, against the plain cadence, which needs a quarter of the tokens and no cache."""
    return [
        Arm(name="full"),
        Arm(name="xcache", policy=policy("xcache")),
        Arm(name="xcache_reactive", policy=policy("xcache_reactive"), loop=LAST_FULL),
        Arm(name="full, committing as emitted", loop=EMITTED),
        Arm(name="plain cadence", loop=PLAIN),
    ]


def run_ablation(
    model: WorldModel,
    out: Path,
    *,
    chunks: int = CHUNKS,
    scenarios: Sequence[str] = SCENARIOS,
    seed: int = 0,
    every: int = 12,
    clips: Path | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Run the ablation and the control; writes ``ablation.md`` and ``ablation.json``.

    All runs of a scenario are interleaved, each beside full compute of its own cadence. An interrupted measurement
    continues with the scenario it was in.

    Args:
        chunks: per scenario.
        scenarios: of the ablation; the control runs the scripted ones.
        every: SSIM and ST-LPIPS are taken of every N-th frame.
        clips: where the scenarios start.

    Raises:
        ValueError: ``chunks`` has no whole cycle after the warm-up, or a clip is too short for the chunks.
    """
    if chunks < 2 * model.sizes.window:
        raise ValueError(f"chunks={chunks} has no cycle after the warm-up; give {2 * model.sizes.window}")
    distance = StLpips()
    loaded = {name: load_scenario(name, model, clips=clips, chunks=chunks) for name in {*scenarios, *KINDS}}
    settings = {"chunks": chunks, "seed": seed, "every": every}
    parts = Parts(out, "ablation", model, clips=str(clips), **settings)
    metrics = Metrics(every=every, distance=distance)
    task = progress.add_task("ablation", total=(len(scenarios) + len(KINDS)) * chunks)

    plan = [("ablation", name, ablation_arms()) for name in scenarios]
    plan += [("control", name, control_arms()) for name in KINDS]
    found: dict[str, list[dict[str, Any]]] = {"ablation": [], "control": []}
    for done, (title, name, arms) in enumerate(plan, 1):
        progress.update(task, description=f"{title}: {name}")
        measure = partial(_run, model, loaded[name], arms, metrics, seed, progress, task)
        found[title].append(parts.get(f"{title}: {name}", measure))
        progress.update(task, completed=done * chunks)
        gc.collect()  # a run and the hook on its model refer to each other; only the collector frees their memory
    figures = {
        **found,
        **settings,
        "environment": environment(model),
    }
    write_card(out, "ablation", card(figures), figures)
    parts.clear()
    return figures


def _run(
    model: WorldModel,
    scenario: Scenario,
    arms: Sequence[Arm],
    metrics: Metrics,
    seed: int,
    progress: Progress,
    task: TaskID,
) -> dict[str, Any]:
    at = moments(scenario.actions, model.sizes.window, MOMENTS)
    with Race(model, scenario, arms, seed=seed) as race, warnings.catch_warnings():
        # One of the results: in the plain cadence full protection leaves nothing to reuse.
        warnings.filterwarnings("ignore", message=".*could reuse nothing")
        reactions = run_race(race, scenario.actions, at=at, advance=lambda: progress.advance(task))
        rows = []
        for arm in arms:
            if arm.policy is None:
                rows.append(describe_full(race.base(arm.name), scenario, metrics, name=arm.name))
            else:
                figures = describe(race, arm.name, scenario, metrics, reactions[arm.name])
                del figures["cosine_by_step_and_block"]  # for the demo's page; too long for this card
                off = psnr(np.array(race.runs[arm.name].commit_errors()))
                rows.append({**figures, "committed_as_emitted_db": finite(off)})
    return {"name": scenario.name, "reaction_measured_at": at, "rows": rows}


def main(
    out: Out = LAB,
    model: Model = None,
    clips: Clips = None,
    chunks: Annotated[int, typer.Option(help="Per scenario, a third of a second each.")] = CHUNKS,
    seed: Seed = 0,
    scenario: Annotated[list[str] | None, typer.Option(help="Only these; may be given more than once.")] = None,
) -> None:
    """X-Cache part by part, the cadence it needs, and the control: one piece per chunk."""
    with bar() as progress:
        chosen = tuple(scenario) if scenario else SCENARIOS
        figures = run_ablation(
            load(model)[0], out, chunks=chunks, scenarios=chosen, seed=seed, clips=clips, progress=progress
        )
    show(out / "ablation.md", figures)


if __name__ == "__main__":
    run_script(main)

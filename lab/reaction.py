"""Brake, steer and change lane in mid-cycle, in every scenario, at several moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import Progress, TaskID

import holdover
from holdover.report.environment import environment
from holdover.report.fidelity import psnr
from holdover.report.progress import bar
from holdover.report.tables import decibels, markdown, ratio
from holdover_world.cli.common import Clips, Model, Seed, load, show
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.scenarios import KINDS, STEADY, Scenario, load_scenario
from holdover_world.measure.cards import about, write_card
from holdover_world.measure.race import Arm, Race
from holdover_world.measure.reaction import EVENTS, Reaction, mean_ratio, moments, run_race
from holdover_world.model.transformer import WorldModel
from lab.cards import LAB, Out, Parts, run_script


def run_reactions(
    model: WorldModel,
    out: Path,
    *,
    chunks: int = 28,
    count: int = 4,
    seed: int = 0,
    clips: Path | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Measure reactions in steady driving; writes ``reaction.md`` and ``reaction.json``.

    An interrupted measurement continues with the scenario it was in.

    Args:
        chunks: to drive in each scenario.
        count: in each, the moments in mid-cycle at which the events happen.
        clips: where the scenarios start.

    Raises:
        ValueError: there are too few chunks for a moment after the first cycle.
    """
    window = model.sizes.window
    arms = [
        Arm(name="xcache", policy=holdover.xcache()),
        Arm(name="xcache_reactive", policy=holdover.xcache_reactive(), loop=LoopConfig(commit="last_full")),
        Arm(name="fixed_interval", policy=holdover.fixed_interval(every=window)),
    ]
    found: dict[str, list[Reaction]] = {arm.name: [] for arm in arms}
    parts = Parts(out, "reaction", model, clips=str(clips), chunks=chunks, count=count, seed=seed)
    task = progress.add_task("reaction", total=len(KINDS) * chunks)
    for done, kind in enumerate(KINDS, 1):
        scenario = load_scenario(kind + STEADY, model, clips=clips, chunks=chunks)
        at = moments(scenario.actions, window, count)
        if not at:
            raise ValueError(f"{scenario.name} has no moment in mid-cycle at which the car moves in {chunks} chunks")
        progress.update(task, description=scenario.name)
        measured = parts.get(scenario.name, partial(_measure, model, scenario, arms, at, seed, progress, task))
        progress.update(task, completed=done * chunks)
        for name, reactions in measured.items():
            found[name] += [Reaction(**{**fields, "ratios": tuple(fields["ratios"])}) for fields in reactions]
    rows = [summary(name, event.name, measured) for name, measured in found.items() for event in EVENTS]
    figures = {"rows": rows, "horizon": window, "environment": environment(model)}
    write_card(out, "reaction", card(figures), figures)
    parts.clear()
    return figures


def _measure(
    model: WorldModel,
    scenario: Scenario,
    arms: Sequence[Arm],
    at: Sequence[int],
    seed: int,
    progress: Progress,
    task: TaskID,
) -> dict[str, list[dict[str, Any]]]:
    with Race(model, scenario, arms, seed=seed) as race:
        horizon = model.sizes.window
        found = run_race(race, scenario.actions, at=at, horizon=horizon, advance=lambda: progress.advance(task))
    return {name: [asdict(reaction) for reaction in reactions] for name, reactions in found.items()}


def mean_late(reactions: Sequence[Reaction], event: str) -> float | None:
    """The mean number of chunks until a run reacted; None if one did not react within the horizon."""
    late = [r.late for r in reactions if r.event == event]
    return None if not late or None in late else fmean(n for n in late if n is not None)


def summary(policy: str, event: str, reactions: Sequence[Reaction]) -> dict[str, Any]:
    """The figures of one policy and event over all moments."""
    of_event = [r for r in reactions if r.event == event]
    own = [r.ratios[0] for r in of_event if r.ratios[0] is not None]
    by_chunk = zip(*(r.ratios for r in of_event), strict=True)
    error = psnr(np.array([r.error for r in of_event]))
    return {
        "policy": policy,
        "event": event,
        "cases": len(of_event),
        "ratio": mean_ratio(reactions, event),
        "lowest": min(own, default=None),
        "highest": max(own, default=None),
        "chunks_late": mean_late(reactions, event),
        "ratio_by_chunk": [_mean([x for x in ratios if x is not None]) for ratios in by_chunk],
        "psnr_db": error if np.isfinite(error) else None,
        "response": fmean(r.response for r in of_event),
    }


def card(figures: dict[str, Any]) -> str:
    """The Markdown of a result."""
    columns = [
        "policy",
        "event",
        "ratio",
        "lowest",
        "highest",
        "chunks late",
        "PSNR, dB",
        "size, /255",
    ]
    columns += [f"after {i}" for i in range(1, figures["horizon"])]
    rows = [
        (
            row["policy"],
            row["event"].replace("_", " "),
            ratio(row["ratio"]),
            ratio(row["lowest"]),
            ratio(row["highest"]),
            "never" if row["chunks_late"] is None else f"{row['chunks_late']:.1f}",
            decibels(row["psnr_db"]),
            f"{row['response']:.2f}",
            *(ratio(value) for value in row["ratio_by_chunk"][1:]),
        )
        for row in figures["rows"]
    ]
    return f"""# Does a cached rollout still obey?

Steady driving in three scenarios. In the middle of a cycle the car is told to brake to a fifth of its speed, to turn
sharply, or to change lane. The ratio is the projection of what that changes in the cached rollout onto what it changes
under full compute, in the event's own chunk: 1 is right, at 0 the car does not react. "Chunks late" counts until the
ratio first reaches 0.9, {figures["horizon"]} chunks at most. PSNR is that of the event's own chunk against full
compute. It is high even where the car does not react, because the event changes little: "size" is the root mean square
of that change. {figures["rows"][0]["cases"]} cases a row.

{markdown(columns, rows)}
{about(figures["environment"])}
"""


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def main(
    out: Out = LAB,
    model: Model = None,
    clips: Clips = None,
    chunks: Annotated[int, typer.Option(help="To drive in each scenario.")] = 28,
    moments: Annotated[int, typer.Option(help="At which the events happen, in each scenario.")] = 4,
    seed: Seed = 0,
) -> None:
    """Brake, steer and change lane in mid-cycle: how much of it a cached rollout shows, and how late."""
    with bar() as progress:
        figures = run_reactions(
            load(model)[0], out, chunks=chunks, count=moments, seed=seed, clips=clips, progress=progress
        )
    show(out / "reaction.md", figures)


if __name__ == "__main__":
    run_script(main)

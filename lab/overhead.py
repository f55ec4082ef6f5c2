"""What attaching costs: with nothing reused, with every block scored and stored, and with every block reused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import Progress

import holdover
from holdover.method import Policy
from holdover.report.environment import environment
from holdover.report.progress import bar
from holdover.report.tables import markdown, percent
from holdover_world.cli.common import Clips, Model, Seed, load, show
from holdover_world.loop.scenarios import load_scenario
from holdover_world.measure.cards import about, write_card
from holdover_world.measure.race import Arm, Race
from holdover_world.model.transformer import WorldModel
from lab.cards import LAB, Out, run_script

#: The first chunks are not counted: they warm up the process and the policies.
WARM_UP = 4


def arms() -> Mapping[str, tuple[Policy, str]]:
    """The policies that are timed, each with what it stands for."""
    return {
        "never": (holdover.never(), "attached; nothing is scored, nothing is held"),
        "closed gate": (
            holdover.xcache(protection="pass", tau_floor=2.0),
            "X-Cache with a gate that never opens: every block is scored and stored, none is reused",
        ),
        "open gate": (
            holdover.xcache(protection="pass", tau_floor=-1.0, margin=2.0, tau_dev=float("inf")),
            "X-Cache with a gate that always opens: every block but the first is reused",
        ),
    }


def run_overhead(
    model: WorldModel, out: Path, *, chunks: int = 44, seed: int = 0, clips: Path | None = None, progress: Progress
) -> dict[str, Any]:
    """Time a rollout unattached and under each of `arms`, interleaved; writes ``overhead.md`` and ``overhead.json``.

    Args:
        chunks: to drive; the first `WARM_UP` are not counted.
        clips: where the "urban-steady" scenario starts.

    Raises:
        ValueError: there are too few chunks.
    """
    if chunks <= WARM_UP:
        raise ValueError(f"chunks={chunks}: give more than the {WARM_UP} of warm-up")
    scenario = load_scenario("urban-steady", model, clips=clips, chunks=chunks)
    policies = arms()
    task = progress.add_task("overhead", total=chunks)
    different: set[str] = set()
    with Race(model, scenario, [Arm(name=n, policy=p) for n, (p, _) in policies.items()], seed=seed) as race:
        base = race.base("never")
        for action in scenario.actions:
            race.step(action)
            made = base.pieces[-1].latents
            different |= {n for n, run in race.runs.items() if not torch.equal(run.pieces[-1].latents, made)}
            progress.advance(task)
        full = np.array(base.dit_seconds[WARM_UP:])
        rows = [{"name": "unattached", "dit_ms_per_chunk": 1e3 * float(np.median(full)), "ratio": 1.0}]
        for name, (_, meaning) in policies.items():
            run = race.runs[name]
            seconds = np.array(run.dit_seconds[WARM_UP:])
            stats = run.stats()
            assert stats is not None
            row: dict[str, Any] = {
                "name": name,
                "meaning": meaning,
                "dit_ms_per_chunk": 1e3 * float(np.median(seconds)),
                "ratio": float(np.median(seconds / full)),
                "skip": stats.skip,
                "bytes_held": stats.bytes_held,
                "identical": name not in different,
            }
            rows.append(row)
    figures = {"chunks": chunks - WARM_UP, "rows": rows, "environment": environment(model)}
    write_card(out, "overhead", card(figures), figures)
    return figures


def card(figures: dict[str, Any]) -> str:
    """The Markdown of a result."""
    rows = []
    for row in figures["rows"]:
        attached = "meaning" in row
        rows.append(
            (
                row["name"],
                f"{row['dit_ms_per_chunk']:.1f}",
                f"{100 * (row['ratio'] - 1):+.1f} %",
                percent(row["skip"]) if attached else "",
                f"{row['bytes_held'] / 2**20:.1f}" if attached else "",
                ("yes" if row["identical"] else "no") if attached else "",
            )
        )
    columns = "what", "DiT ms per chunk", "against unattached", "skip", "MiB held", "same bits"
    meanings = "\n".join(f"- *{row['name']}*: {row['meaning']}." for row in figures["rows"] if "meaning" in row)
    return f"""# What attaching costs

The shipped world model on steady urban driving, {figures["chunks"]} chunks after the warm-up, all runs
interleaved chunk by chunk in one process. Times are medians, KV updates included; "against unattached" is
the median of the paired ratios.

{markdown(columns, rows)}
{meanings}

{about(figures["environment"])}
"""


def main(
    out: Out = LAB,
    model: Model = None,
    clips: Clips = None,
    chunks: Annotated[int, typer.Option(help=f"To time; the first {WARM_UP} are warm-up.")] = 44,
    seed: Seed = 0,
) -> None:
    """What attaching costs where nothing is reused, and what is left where everything is."""
    with bar() as progress:
        figures = run_overhead(load(model)[0], out, chunks=chunks, seed=seed, clips=clips, progress=progress)
    show(out / "overhead.md", figures)


if __name__ == "__main__":
    run_script(main)

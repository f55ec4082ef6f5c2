"""Steady driving from many recordings: is X-Cache as near to full compute at the end of a drive as at its beginning?

    for kind in straight urban uturn; do
        holdover world record --scenario $kind --clips 8 --seed 900000 --out data/steady --workers 2
    done
    python -m lab.steady

The PSNR of a window depends on what is driven past; the mean over many roads shows what time does. Writes ``steady.md``
and ``steady.json``. An interrupted measurement continues with the drive it was in.
"""

from __future__ import annotations

import gc
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from holdover.methods.registry import policy
from holdover.report.environment import environment
from holdover.report.progress import bar
from holdover.report.tables import markdown
from holdover_world.cli.common import show
from holdover_world.loop.scenarios import load_scenario, shipped_model
from holdover_world.measure.cards import about, write_card
from holdover_world.measure.fidelity import compare
from holdover_world.measure.race import Arm, Race
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import FPS
from holdover_world.scene.clips import list_clips
from lab.cards import LAB, Out, Parts, run_script

#: By scenario, the kind of clip that it begins in.
KINDS = {"highway-steady": "straight", "urban-steady": "urban", "uturn-steady": "uturn"}


def drive(model: WorldModel, name: str, clip: Path, chunks: int) -> dict[str, Any]:
    """One drive, in full and under X-Cache: PSNR of the windows of at least five seconds at either end, and of each."""
    with tempfile.TemporaryDirectory() as folder:  # a scenario begins in the first clip of a folder
        for path in (clip, clip.parent / "dataset.json"):
            Path(folder, path.name).symlink_to(path.resolve())
        scenario = load_scenario(name, model, clips=Path(folder), chunks=chunks)
    with Race(model, scenario, [Arm(name="xcache", policy=policy("xcache"))]) as race:
        for action in scenario.actions:
            race.step(action)
        made, true = race.runs["xcache"], race.reference("xcache")
        stats = made.stats()
        comparison = compare(made.video(), true.video(), every=chunks * model.sizes.frames_per_latent)
    gc.collect()  # a run and the hook on its model refer to each other; only the collector frees their memory
    assert stats is not None
    window = model.sizes.window * model.sizes.frames_per_latent
    first, last = comparison.psnr_at_ends(window, 5 * FPS)
    return {
        "clip": clip.name,
        "skip": stats.skip,
        "first": first,
        "last": last,
        "by_window": comparison.psnr_by(window),
    }


def summary(drives: list[dict[str, Any]]) -> dict[str, float]:
    """The mean change from the first to the last windows, its standard error, and the scatter of windows in a drive."""
    change = np.array([one["last"] - one["first"] for one in drives])
    return {
        "change": float(change.mean()),
        "standard_error": float(change.std(ddof=1) / len(change) ** 0.5),
        "windows": float(np.mean([np.std(one["by_window"], ddof=1) for one in drives])),
    }


def card(figures: dict[str, Any]) -> str:
    """The Markdown of a result."""
    found = figures["drives"]
    means = [
        (
            name,
            str(len(found[name])),
            f"{np.mean([one['first'] for one in found[name]]):.2f}",
            f"{np.mean([one['last'] for one in found[name]]):.2f}",
            f"{each['change']:+.2f} ± {each['standard_error']:.2f}",
            f"{each['windows']:.2f}",
        )
        for name, each in figures["summary"].items()
    ]
    rows = [
        (
            one["clip"],
            f"{100 * one['skip']:.1f} %",
            f"{one['first']:.2f}",
            f"{one['last']:.2f}",
            f"{one['last'] - one['first']:+.2f}",
            " ".join(f"{value:.1f}" for value in one["by_window"]),
        )
        for drives in found.values()
        for one in drives
    ]
    return f"""# Steady driving, from many recordings

`python -m lab.steady`: `xcache` against full compute, {figures["chunks"]} chunks at one action, from each of the
recordings named. PSNR in dB, stitched: of the windows of at least five seconds at either end, the mean change between
them with its standard error, and how much a drive's windows scatter.

{markdown(("scenario", "drives", "first", "last", "change", "scatter"), means)}
{markdown(("recording", "skip", "first", "last", "change", "by window"), rows)}
{about(figures["on"])}
"""


def main(
    clips: Annotated[Path, typer.Option(help="Recordings, at least two of each kind.")] = Path("data/steady"),
    out: Out = LAB,
    chunks: Annotated[int, typer.Option(help="Per drive, a third of a second each.")] = 60,
) -> None:
    """X-Cache against full compute in steady driving from many recordings."""
    model = WorldModel.load(shipped_model())
    if chunks < 2 * model.sizes.window:
        raise ValueError(f"--chunks {chunks} is less than two windows; give at least {2 * model.sizes.window}")
    recordings = {
        name: [clip for clip in list_clips(clips) if clip.name.startswith(f"{kind}-")] for name, kind in KINDS.items()
    }
    few = [KINDS[name] for name, found in recordings.items() if len(found) < 2]
    if few:
        command = f"holdover world record --scenario {few[0]} --clips 8 --seed 900000 --out {clips}"
        raise ValueError(f"{clips} holds fewer than two {few[0]} clips; record some: {command}")
    parts = Parts(out, "steady", model, clips=str(clips), chunks=chunks)
    drives: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS}
    with bar() as progress:
        task = progress.add_task("steady", total=sum(map(len, recordings.values())))
        for name, paths in recordings.items():
            for clip in paths:
                progress.update(task, description=clip.name)
                drives[name].append(parts.get(clip.name, partial(drive, model, name, clip, chunks)))
                progress.advance(task)
    figures = {
        "chunks": chunks,
        "summary": {name: summary(found) for name, found in drives.items()},
        "drives": drives,
        "on": environment(model, shipped_model()),
    }
    write_card(out, "steady", card(figures), figures)
    parts.clear()
    show(out / "steady.md", figures)


if __name__ == "__main__":
    run_script(main)

"""Steady driving from many recordings: is X-Cache as near to full compute at the end of a drive as at its beginning?

    for kind in straight urban uturn; do
        holdover world record --scenario $kind --clips 8 --seed 900000 --out data/steady --workers 2
    done
    python benchmarks/steady.py

What is driven past has a say in every window's PSNR; the mean over roads is left with what time does. Writes
``steady.md`` and ``steady.json``; a measurement that was cut off goes on with the drive it was in.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from holdover.methods.registry import policy
from holdover.report.progress import bar
from holdover.report.tables import markdown
from holdover_world.loop.scenarios import load_scenario, shipped_model
from holdover_world.measure.fidelity import compare
from holdover_world.measure.measure import environment
from holdover_world.measure.race import Arm, Race
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import FPS
from holdover_world.scene.clips import list_clips
from lab.cards import Parts, about, write_card

#: Scenarios, and the kind of clip that each begins in.
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
        made, true = race.lanes["xcache"], race.reference("xcache")
        stats = made.stats()
        comparison = compare(made.video(), true.video(), every=chunks * model.sizes.frames_per_latent)
    gc.collect()  # a lane and the hook on its model hold each other
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=Path("data/steady"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--chunks", type=int, default=60, help="per drive, a third of a second each")
    options = parser.parse_args()
    model = WorldModel.load(shipped_model())
    if options.chunks < 2 * model.sizes.window:
        parser.error(f"--chunks {options.chunks} are fewer than two windows; give {2 * model.sizes.window}")
    clips = {
        name: [clip for clip in list_clips(options.clips) if clip.name.startswith(f"{kind}-")]
        for name, kind in KINDS.items()
    }
    few = [KINDS[name] for name, found in clips.items() if len(found) < 2]
    if few:
        parser.error(f"{options.clips} holds fewer than two {few[0]} clips; record some, see above")
    parts = Parts(options.out, "steady", model, clips=str(options.clips), chunks=options.chunks)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS}
    with bar() as progress:
        task = progress.add_task("steady", total=sum(map(len, clips.values())))
        for name, paths in clips.items():
            for clip in paths:
                progress.update(task, description=clip.name)
                found[name].append(parts.get(clip.name, partial(drive, model, name, clip, options.chunks)))
                progress.advance(task)

    summaries = {name: summary(drives) for name, drives in found.items()}
    means = [
        (
            name,
            str(len(found[name])),
            f"{np.mean([one['first'] for one in found[name]]):.2f}",
            f"{np.mean([one['last'] for one in found[name]]):.2f}",
            f"{each['change']:+.2f} ± {each['standard_error']:.2f}",
            f"{each['windows']:.2f}",
        )
        for name, each in summaries.items()
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
    surroundings = environment(model, shipped_model())
    text = (
        "# Steady driving, from many recordings\n\n"
        f"`python benchmarks/steady.py`: `xcache` against full compute, {options.chunks} chunks at one\n"
        "action, from each of the recordings named. PSNR in dB, stitched: of the windows of at least five seconds at\n"
        "either end, the mean change between them with its standard error, and how much a drive's windows scatter.\n\n"
        + markdown(("scenario", "drives", "first", "last", "change", "scatter"), means)
        + "\n"
        + markdown(("recording", "skip", "first", "last", "change", "by window"), rows)
        + f"\n{about(surroundings)}\n"
    )
    figures = {"chunks": options.chunks, "summary": summaries, "drives": found, "on": surroundings}
    write_card(options.out, "steady", text, figures)
    parts.clear()
    print(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

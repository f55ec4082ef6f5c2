"""The demo: a world model drives with and without X-Cache, and the difference in time and in pixels is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.progress import Progress, TaskID

from holdover.bench.lanes import Arm, Lane, Race
from holdover.bench.measure import INTERVAL, Metrics, describe, describe_full, environment
from holdover.bench.reaction import drive, moments
from holdover.bench.stlpips import StLpips
from holdover.bench.timing import cadence_block_share
from holdover.policies.registry import policy
from holdover.report.files import write_json
from holdover.report.page import write_page
from holdover.report.plots import plot_block_skip, plot_cosine_maps, plot_psnr_over_time
from holdover.report.video import write_side_by_side
from holdover.rollout.driver import LoopConfig
from holdover.rollout.scenarios import NAMES, STEADY, Scenario, load_scenario
from holdover.world.cameras import FPS, stitch
from holdover.world.transformer import WorldModel

#: What `run_demo` compares; the names are those of the policies.
ARMS = (("xcache", LoopConfig(commit="first")), ("xcache_reactive", LoopConfig(commit="last_full")))
MOMENTS = 1  # at which each rollout's reactions are measured


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What to run.

    Attributes:
        scenarios: names, see `holdover.rollout.scenarios.NAMES`.
        generations: per scenario; the default is 20 seconds, in whole cycles.
        seed: of the noise.
        every: SSIM and ST-LPIPS look at every so-manieth frame. They cost more than the driving.
    """

    scenarios: Sequence[str] = NAMES
    generations: int = 60
    seed: int = 0
    every: int = 12

    def __post_init__(self) -> None:
        unknown = [name for name in self.scenarios if name not in NAMES]
        if unknown:
            raise ValueError(f"scenario {unknown[0]!r} is not one of {', '.join(NAMES)}")
        if not self.scenarios:
            raise ValueError("no scenario given; name at least one")
        if self.every < 1:
            raise ValueError(f"every={self.every} is not a number of frames; give 1 or more")


def run_demo(
    model: WorldModel,
    out: Path,
    options: DemoOptions,
    *,
    clips: Path | None = None,
    checkpoint: Path | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Run the demo and write its files to ``out``: report.json, index.html, videos and plots.

    Args:
        model: the world model; is copied, not changed.
        out: a folder; is created, and files of an earlier demo are replaced.
        clips: recordings to start from; by default the shipped ones.
        checkpoint: the model's file, named in the report.
        progress: shows how far the demo is.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: ``generations`` is too short for a cycle after the warm-up, or a clip for the generations.
    """
    shortest = 2 * model.config.window
    if options.generations < shortest:
        raise ValueError(f"generations={options.generations} has no cycle after the warm-up; give {shortest} or more")
    distance, started = StLpips(), perf_counter()
    scenarios = [
        load_scenario(name, model.config, clips=clips, generations=options.generations) for name in options.scenarios
    ]
    total = progress.add_task("demo", total=len(scenarios) * (options.generations + 1) + 1)
    share = cadence_block_share(model, scenarios[0], LoopConfig())
    progress.advance(total)
    metrics = Metrics(every=options.every, distance=distance, block_shares={"window": share})
    entries = []
    for scenario in scenarios:
        entries.append(_run_scenario(model, scenario, out, options, metrics, progress, total))
    report = {
        "scenarios": entries,
        "environment": {**environment(checkpoint), "block_share": share},
        "settings": {
            "generations": options.generations,
            "seed": options.seed,
            "every": options.every,
            "scenarios": list(options.scenarios),
            "fps": FPS,
            "skip_ceiling": steady_skip_ceiling(model),
        },
        "seconds": round(perf_counter() - started, 1),
    }
    write_json(out / "report.json", report)
    write_page(out, report)
    return report


def steady_skip_ceiling(model: WorldModel) -> float:
    """The most that X-Cache can skip: all but the first generation of a cycle, all but the first block."""
    window, blocks = model.config.window, model.config.depth
    return (window - 1) / window * (blocks - 1) / blocks


def _run_scenario(
    model: WorldModel,
    scenario: Scenario,
    out: Path,
    options: DemoOptions,
    metrics: Metrics,
    progress: Progress,
    total: TaskID,
) -> dict[str, Any]:
    arms = [Arm(name=name, policy=policy(name), loop=loop) for name, loop in ARMS]
    at = moments(scenario.actions, model.config.window, MOMENTS)
    progress.update(total, description=f"{scenario.name}: driving")
    with Race(model, scenario, arms, seed=options.seed) as race:
        reactions = drive(race, scenario.actions, at=at, advance=lambda: progress.advance(total))
        progress.update(total, description=f"{scenario.name}: comparing")
        entry: dict[str, Any] = {
            "name": scenario.name,
            "split": scenario.name.removesuffix(STEADY),
            "frames": options.generations * model.config.frames_per_latent,
            "actions": scenario.actions.tolist(),
            "reaction_measured_at": at,
            "policies": [describe_full(race.base(arms[0].name), scenario, metrics)],
        }
        for arm in arms:
            figures = describe(race, arm.name, scenario, metrics, reactions[arm.name])
            figures["video"] = _video(out, scenario.name, race.reference(arm.name), race.lanes[arm.name])
            entry["policies"].append(figures)
        entry["plots"] = _plots(out, entry)
    progress.advance(total)
    return entry


def _video(out: Path, scenario: str, full: Lane, cached: Lane) -> str:
    name = f"{scenario}-{cached.arm.name}.mp4"
    write_side_by_side(out / name, [stitch(full.video()), stitch(cached.video())], fps=FPS)
    return name


def _plots(out: Path, entry: dict[str, Any]) -> dict[str, str]:
    """Draw a scenario's figures; returns their file names."""
    cached = {p["name"]: p for p in entry["policies"] if p["policy"]}
    files = {kind: f"{entry['name']}-{kind}.png" for kind in ("block-skip", "cosine-map", "psnr")}
    plot_block_skip(out / files["block-skip"], {n: np.array(p["skip_by_block"], float) for n, p in cached.items()})
    plot_cosine_maps(
        out / files["cosine-map"], {n: np.array(p["cosine_by_step_and_block"], float) for n, p in cached.items()}
    )
    by_second = {n: np.array(p["psnr_db_by_second"], float) for n, p in cached.items()}
    plot_psnr_over_time(out / files["psnr"], by_second, seconds=INTERVAL / FPS)
    return files

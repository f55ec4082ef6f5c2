"""The demo: a world model drives with and without X-Cache, and the difference in time and in pixels is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.progress import Progress, TaskID

from holdover.methods.registry import policy
from holdover.report.environment import environment
from holdover.report.files import write_json
from holdover.report.page import build_page
from holdover.report.recording import command_line
from holdover.report.run_dir import ChunkRecord, Rollout, remove_rollouts
from holdover.report.run_write import write_rollout
from holdover_world.loop.closed_loop import Cadence, LoopConfig
from holdover_world.loop.scenarios import NAMES, STEADY, Scenario, load_scenario
from holdover_world.measure.measure import Metrics, describe, describe_full
from holdover_world.measure.race import Arm, ArmRun, Race
from holdover_world.measure.reaction import EVENTS, drive, moments
from holdover_world.measure.stlpips import StLpips
from holdover_world.measure.tables import published_figures
from holdover_world.measure.timing import cadence_block_share
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import FPS, STITCH_ROWS

#: What `run_demo` compares; the names are those of the policies.
ARMS = (("xcache", LoopConfig(commit="first")), ("xcache_reactive", LoopConfig(commit="last_full")))
MOMENTS = 1  # at which each rollout's reactions are measured
SHOWN = [event for event in EVENTS if event.name in ("brake", "steer")]

#: How many chunks are driven where nothing is asked for: twenty seconds, or what is done in nine minutes, so that
#: cores that slow down on the way have one more.
LONGEST, SECONDS = 60, 540.0
#: What a scenario takes, in chunks of full compute and steady driving: for each chunk, on the script and
#: steady; for reactions, reading, writing and comparing.
_STEPS: Mapping[Cadence, tuple[float, float]] = {"window": (4.2, 2.1), "plain": (3.7, 3.7)}
_SCENARIO = 22.0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What to run.

    Attributes:
        scenarios: names, see `holdover_world.loop.scenarios.NAMES`.
        chunks: per scenario; by default 60, which are 20 seconds, or as many whole cycles as are done in ten
            minutes on the machine at hand.
        seed: of the noise.
        cadence: in ``plain`` every chunk is committed, and X-Cache has nothing to skip.
        every: SSIM and ST-LPIPS look at every so-manieth frame.
    """

    scenarios: Sequence[str] = NAMES
    chunks: int | None = None
    seed: int = 0
    cadence: Cadence = "window"
    every: int = 20  # five chunks: as many looks at each place of a cycle

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
    """Run the demo and write its files to ``out``: report.json, the rollouts (`holdover.report.run_dir`), the page.

    Args:
        model: the world model; is copied, not changed.
        out: a folder; is created, and files of an earlier demo are replaced.
        clips: recordings to start from; by default the shipped ones.
        checkpoint: the model's folder, named in the report.
        progress: shows how far the demo is.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: ``chunks`` is too short for a cycle after the warm-up, or a clip for the chunks.
    """
    shortest = 2 * model.sizes.window
    chunks = LONGEST if options.chunks is None else options.chunks
    if chunks < shortest:
        raise ValueError(f"chunks={options.chunks} has no cycle after the warm-up; give {shortest} or more")
    distance, started = StLpips(), perf_counter()
    scenarios = [load_scenario(name, model, clips=clips, chunks=chunks) for name in options.scenarios]
    total = progress.add_task("demo", total=None)
    share, pace = cadence_block_share(model, scenarios[0], LoopConfig(cadence=options.cadence))
    if options.chunks is None:
        chunks = affordable(pace, options.scenarios, model.sizes.window, options.cadence)
        scenarios = [scenario.first(chunks, model.sizes.frames_per_latent) for scenario in scenarios]
        if chunks < LONGEST:
            progress.print(
                f"{chunks} chunks per scenario are done in ten minutes here, "
                f"{chunks * model.sizes.frames_per_latent / FPS:.0f} seconds of driving; "
                f"--chunks {LONGEST} takes what it takes."
            )
    progress.update(total, total=len(scenarios) * (chunks + 1) + 1, completed=1)
    metrics = Metrics(every=options.every, distance=distance, block_shares={options.cadence: share}, events=SHOWN)
    about = {**environment(model, checkpoint), "block_share": share}
    for name in NAMES:
        remove_rollouts(out, name)
    entries = []
    for scenario in scenarios:
        entries.append(_run_scenario(model, scenario, out, options, metrics, about, progress, total))
    report = {
        "scenarios": entries,
        "environment": about,
        "settings": {
            "chunks": chunks,
            "seed": options.seed,
            "cadence": options.cadence,
            "every": options.every,
            "scenarios": list(options.scenarios),
            "fps": FPS,
            "skip_ceiling": steady_skip_ceiling(model) if options.cadence == "window" else 0.0,
        },
        "seconds": round(perf_counter() - started, 1),
    }
    write_json(out / "report.json", report)
    progress.update(total, description="drawing the page")
    build_page(out)
    return report


def affordable(pace: float, scenarios: Sequence[str], cycle: int, cadence: Cadence = "window") -> int:
    """How many chunks of each scenario are done in ten minutes: whole cycles, two at least, `LONGEST` at most.

    Args:
        pace: seconds of a chunk in full compute, in steady driving.
        scenarios: names.
        cycle: chunks of a cycle.
        cadence: in ``plain`` nothing is skipped, on the script or in steady driving.
    """
    scripted, steady = _STEPS[cadence]
    steps = sum(steady if name.endswith(STEADY) else scripted for name in scenarios)
    chunks = (SECONDS / pace - _SCENARIO * len(scenarios)) / steps
    return min(LONGEST, max(2, int(chunks // cycle)) * cycle)


def steady_skip_ceiling(model: WorldModel) -> float:
    """The most that X-Cache can skip: all but the first chunk of a cycle, all but the first block."""
    window, blocks = model.sizes.window, model.sizes.layers
    return (window - 1) / window * (blocks - 1) / blocks


def _run_scenario(
    model: WorldModel,
    scenario: Scenario,
    out: Path,
    options: DemoOptions,
    metrics: Metrics,
    about: Mapping[str, Any],
    progress: Progress,
    total: TaskID,
) -> dict[str, Any]:
    arms = [Arm(name=n, policy=policy(n), loop=replace(loop, cadence=options.cadence)) for n, loop in ARMS]
    at = moments(scenario.actions, model.sizes.window, MOMENTS)
    progress.update(total, description=f"{scenario.name}: driving")
    with Race(model, scenario, arms, seed=options.seed) as race:
        held = {arm.name: list[int]() for arm in arms}

        def advance() -> None:
            progress.advance(total)
            for name, lane in race.lanes.items():
                stats = lane.stats()
                held[name].append(stats.bytes_held if stats else 0)

        reactions = drive(race, scenario.actions, at=at, events=metrics.events, advance=advance)
        progress.update(total, description=f"{scenario.name}: comparing")
        full = race.base(arms[0].name)
        policies = [describe_full(full, scenario, metrics)]
        writer = _Writer(out, scenario, options.seed, about)
        writer.write(full, "full", policies[0])
        for arm in arms:
            reference, name = race.reference(arm.name), "full"
            if reference.loop is not full.loop:
                name = f"full-as-{arm.name}"
                writer.write(reference, name, {})
            policies.append(describe(race, arm.name, scenario, metrics, reactions[arm.name]))
            writer.write(race.lanes[arm.name], arm.name, policies[-1], reference, name, held[arm.name])
    progress.advance(total)
    return {
        "name": scenario.name,
        "split": scenario.name.removesuffix(STEADY),
        "frames": len(scenario.actions) * model.sizes.frames_per_latent,
        "actions": scenario.actions.tolist(),
        "reaction_measured_at": at,
        "policies": policies,
    }


@dataclass(frozen=True)
class _Writer:
    """Writes the rollouts of one scenario."""

    out: Path
    scenario: Scenario
    seed: int
    about: Mapping[str, Any]
    command: str = field(default_factory=command_line)

    def write(
        self,
        lane: ArmRun,
        name: str,
        figures: Mapping[str, Any],
        reference: ArmRun | None = None,
        reference_name: str | None = None,
        held: Sequence[int] = (),
    ) -> None:
        cached = lane.arm.policy is not None
        chunks = [
            ChunkRecord(
                chunk=g,
                frames=lane.loop.model.sizes.frames_per_latent,
                seconds=lane.end_to_end_seconds[g],
                dit_seconds=lane.dit_seconds[g],
                bytes_held=held[g] if held else None,
                action=tuple(action),
            )
            for g, action in enumerate(self.scenario.actions.tolist())
        ]
        rollout = Rollout(
            scenario=self.scenario.name,
            name=name,
            fps=FPS,
            policy=repr(lane.arm.policy) if cached else None,
            reference=reference_name,
            block_share=self.about["block_share"] if cached else None,
            figures=figures,
            published=published_figures(self.scenario.name) if name == "full" else {},
            rows=STITCH_ROWS,
            command=self.command,
            seed=self.seed,
            environment=self.about,
        )
        write_rollout(
            self.out,
            rollout,
            lane.video(),
            chunks=chunks,
            decisions=lane.decisions() if cached else (),
            reference=reference.video() if reference else None,
        )

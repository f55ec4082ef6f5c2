"""The demo: a world model drives with and without X-Cache. Its figures compare the time and the pixels."""

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
from holdover_world.loop.config import Cadence, LoopConfig
from holdover_world.loop.scenarios import NAMES, STEADY, Scenario, load_scenario
from holdover_world.measure.figures import Metrics, describe, describe_full
from holdover_world.measure.race import Arm, ArmRun, Race
from holdover_world.measure.reaction import EVENTS, moments, run_race
from holdover_world.measure.stlpips import StLpips
from holdover_world.measure.tables import published_figures
from holdover_world.measure.timing import cadence_block_share
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import FPS, STITCH_ROWS

#: The arms of the demo. Their names are those of the policies.
ARMS = (("xcache", LoopConfig(commit="first")), ("xcache_reactive", LoopConfig(commit="last_full")))
MOMENTS = 1  # moments in each run at which reactions are measured
SHOWN = [event for event in EVENTS if event.name in ("brake", "steer")]

#: By default: at most this many chunks per scenario (twenty seconds), and about this many seconds in all. Nine minutes
#: leave a reserve of one minute for cores that slow down.
LONGEST, SECONDS = 60, 540.0
#: The cost of a scenario, in units of one chunk of full compute: for each chunk of a scripted and of a steady scenario,
#: and once for reading, reactions, writing and comparing.
_STEPS: Mapping[Cadence, tuple[float, float]] = {"window": (4.2, 2.1), "plain": (3.7, 3.7)}
_SCENARIO = 22.0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of the demo.

    Attributes:
        scenarios: names from `holdover_world.loop.scenarios.NAMES`.
        chunks: chunks per scenario. By default 60 (20 seconds), or the whole cycles that this machine drives in ten
            minutes.
        seed: the seed of the noise.
        cadence: the cadence. In ``plain`` every chunk is committed, so X-Cache cannot skip anything.
        every: SSIM and ST-LPIPS are computed on every n-th frame.
    """

    scenarios: Sequence[str] = NAMES
    chunks: int | None = None
    seed: int = 0
    cadence: Cadence = "window"
    every: int = 20  # five chunks, so that every position of a cycle is sampled equally often

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
    """Run the demo. Writes ``report.json``, the rollouts (`holdover.report.run_dir`) and the page to ``out``.

    Args:
        model: the world model. It is copied, not changed.
        out: the folder to write to. Files of an earlier demo are replaced.
        clips: the recordings to start from; by default the shipped ones.
        checkpoint: the model's folder, for the report.
        progress: shows the progress.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: ``chunks`` leaves no cycle after the warm-up, or a clip is too short for the chunks.
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
                f"This machine drives {chunks} chunks per scenario in ten minutes "
                f"({chunks * model.sizes.frames_per_latent / FPS:.0f} seconds of video). "
                f"For {LONGEST}, however long it takes: --chunks {LONGEST}."
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
    """The number of chunks per scenario for ten minutes: whole cycles, at least two, at most `LONGEST` chunks.

    Args:
        pace: seconds of a chunk in full compute.
        scenarios: names of the scenarios.
        cycle: the number of chunks in a cycle.
        cadence: the cadence; in ``plain`` nothing is skipped.
    """
    scripted, steady = _STEPS[cadence]
    steps = sum(steady if name.endswith(STEADY) else scripted for name in scenarios)
    chunks = (SECONDS / pace - _SCENARIO * len(scenarios)) / steps
    return min(LONGEST, max(2, int(chunks // cycle)) * cycle)


def steady_skip_ceiling(model: WorldModel) -> float:
    """The greatest skip rate of X-Cache: all but the first chunk of a cycle, and in it all but the first block."""
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
            for name, run in race.runs.items():
                stats = run.stats()
                held[name].append(stats.bytes_held if stats else 0)

        reactions = run_race(race, scenario.actions, at=at, events=metrics.events, advance=advance)
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
            writer.write(race.runs[arm.name], arm.name, policies[-1], reference, name, held[arm.name])
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
        run: ArmRun,
        name: str,
        figures: Mapping[str, Any],
        reference: ArmRun | None = None,
        reference_name: str | None = None,
        held: Sequence[int] = (),
    ) -> None:
        cached = run.arm.policy is not None
        chunks = [
            ChunkRecord(
                chunk=g,
                frames=run.loop.model.sizes.frames_per_latent,
                seconds=run.end_to_end_seconds[g],
                dit_seconds=run.dit_seconds[g],
                bytes_held=held[g] if held else None,
                action=tuple(action),
            )
            for g, action in enumerate(self.scenario.actions.tolist())
        ]
        rollout = Rollout(
            scenario=self.scenario.name,
            name=name,
            fps=FPS,
            policy=repr(run.arm.policy) if cached else None,
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
            run.video(),
            chunks=chunks,
            decisions=run.decisions() if cached else (),
            reference=reference.video() if reference else None,
        )

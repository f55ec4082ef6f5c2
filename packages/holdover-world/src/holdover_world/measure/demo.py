"""The demo: a world model drives with and without caches. Its figures compare the time and the pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

from rich.progress import Progress, TaskID

from holdover.methods.registry import policy
from holdover.report.environment import environment
from holdover.report.files import write_json
from holdover.report.page import build_page
from holdover.report.recording import command_line
from holdover.report.run_dir import ChunkRecord, Rollout, remove_rollouts
from holdover.report.run_write import write_rollout
from holdover_world.loop.config import Cadence, HoldWindow, LoopConfig
from holdover_world.loop.scenarios import KINDS, NAMES, STEADY, Scenario, load_scenario
from holdover_world.measure.figures import Metrics, describe, describe_full, described
from holdover_world.measure.race import Arm, ArmRun, Race
from holdover_world.measure.reaction import EVENTS, moments, run_race
from holdover_world.measure.stlpips import StLpips
from holdover_world.measure.tables import published_figures
from holdover_world.measure.timing import chunk_seconds
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import FPS, STITCH_ROWS

Told = Literal["oracle", "newest", "steady"]

#: What a run is told of the actions to come, in words.
TOLD: Mapping[Told, str] = {
    "oracle": "oracle plan",
    "newest": "newest held",
    "steady": "one action held",
}
#: The recipes of the demo, the fastest first. With `step_hold`, passes of the committed chunk are held as well.
RECIPES: Mapping[Told, Sequence[Arm]] = {
    "oracle": (
        Arm(
            name="held_window+step_hold",
            policy=policy("step_hold"),
            loop=LoopConfig(hold_window=HoldWindow()),
            plan="oracle",
        ),
        Arm(name="xcache", policy=policy("xcache"), plan="oracle"),
    ),
    "newest": (
        Arm(name="frontier+step_hold", policy=(policy("step_hold"), policy("frontier"))),
        Arm(name="xcache", policy=policy("xcache")),
    ),
    "steady": (
        Arm(name="xcache", policy=policy("xcache")),
        Arm(name="xcache_reactive", policy=policy("xcache_reactive"), loop=LoopConfig(commit="last_full")),
    ),
}
#: In the plain cadence a chunk has one latent frame, and no plan. Every chunk is committed.
PLAIN = (
    Arm(name="step_hold", policy=policy("step_hold"), loop=LoopConfig(cadence="plain")),
    Arm(name="xcache", policy=policy("xcache"), loop=LoopConfig(cadence="plain")),
)
MOMENTS = 1  # moments in each run at which reactions are measured
SHOWN = [event for event in EVENTS if event.name in ("brake", "steer")]
#: Scripted drives in the order in which they are shown.
SCRIPTED = ("highway", "urban", "uturn")

#: By default: at most this many chunks of a drive (twenty seconds), at least so many, and between the two what takes
#: about so many seconds in all. Five and a half minutes leave a reserve of half a minute for cores that slow down.
LONGEST, SHORTEST, SECONDS = 60, 24, 330.0
#: The cost of a drive in units of one chunk of full compute: for each chunk, and once for reading, reactions, writing
#: and comparing.
_STEPS: Mapping[Told, float] = {"oracle": 2.1, "newest": 2.7, "steady": 2.4}
_PLAIN_STEPS = 3.4
_DRIVE = 12.0
#: Up to so many chunks, SSIM and ST-LPIPS look at a frame of every chunk.
_SHORT = 30


@dataclass(frozen=True, kw_only=True)
class Drive:
    """One start, what is commanded, and what the runs are told of it.

    Attributes:
        kind: of `holdover_world.loop.scenarios.KINDS`.
        told: what of the actions to come; "steady" drives hold one action.
        cadence: of the loop.
    """

    kind: str
    told: Told
    cadence: Cadence = "window"

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.kind}-{'plain' if self.cadence == 'plain' and self.told != 'steady' else self.told}"

    @property
    def title(self) -> str:
        """What it is, in words."""
        if self.cadence == "window":
            return f"{self.kind}, {TOLD[self.told]}"
        return f"{self.kind}, plain cadence" + (f", {TOLD[self.told]}" if self.told == "steady" else "")

    @property
    def scenario(self) -> str:
        """The name of its scenario."""
        return self.kind + (STEADY if self.told == "steady" else "")

    @property
    def arms(self) -> Sequence[Arm]:
        return PLAIN if self.cadence == "plain" else RECIPES[self.told]

    @property
    def steps(self) -> float:
        """What its runs take for a chunk, in chunks of full compute."""
        return _PLAIN_STEPS if self.cadence == "plain" else _STEPS[self.told]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of the demo.

    Attributes:
        scenarios: names from `holdover_world.loop.scenarios.NAMES`. A "-steady" one holds one action, whatever ``told``
            says.
        told: what runs are told of the actions to come, one drive each: an ``oracle`` plan, which is always kept, or
            the ``newest`` action, which is held for all frames to come; ``steady`` drives hold one action.
        chunks: chunks of a drive. By default 60 (20 seconds), or the whole cycles that this machine drives in six
            minutes, but at least 24.
        seed: the seed of the noise.
        cadence: the cadence. In ``plain`` every chunk is committed, so X-Cache cannot skip anything, and no plan is of
            use.
        every: SSIM and ST-LPIPS are computed on every n-th frame. By default on one of each chunk in drives of up to 30
            chunks, and on every 20th in longer ones, so that every position of a cycle is sampled equally often.
    """

    scenarios: Sequence[str] = SCRIPTED
    told: Sequence[Told] = ("oracle",)
    chunks: int | None = None
    seed: int = 0
    cadence: Cadence = "window"
    every: int | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.scenarios if name not in NAMES]
        if unknown:
            raise ValueError(f"scenario {unknown[0]!r} is not one of {', '.join(NAMES)}")
        if not self.scenarios:
            raise ValueError("no scenario given; name at least one")
        if not self.told or not set(self.told) <= set(get_args(Told)):
            raise ValueError(f"told={self.told!r}: give some of {', '.join(get_args(Told))}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every={self.every} is not a number of frames; give 1 or more")

    @property
    def drives(self) -> list[Drive]:
        """Each once, in the order of what is told."""
        plain = self.cadence == "plain"
        asked: list[Told] = ["newest" if plain and told == "oracle" else told for told in self.told]
        found: list[Drive] = []
        for told in asked:
            for name in self.scenarios:
                kind = name.removesuffix(STEADY)
                found.append(Drive(kind=kind, told=told if name == kind else "steady", cadence=self.cadence))
        return list(dict.fromkeys(found))


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
    least, drives = 2 * model.sizes.window, options.drives
    chunks = LONGEST if options.chunks is None else options.chunks
    if chunks < least:
        raise ValueError(f"chunks={options.chunks} has no cycle after the warm-up; give {least} or more")
    distance, started = StLpips(), perf_counter()
    # All are read before the first drives, so that a clip that is too short is known at once.
    scenarios = [load_scenario(drive.scenario, model, clips=clips, chunks=chunks) for drive in drives]
    total, per = progress.add_task("demo", total=None), model.sizes.frames_per_latent
    if options.chunks is None:
        pace = chunk_seconds(model, scenarios[0], LoopConfig(cadence=options.cadence))
        chunks = affordable(pace, drives, model.sizes.window)
        scenarios = [scenario.first(chunks, per) for scenario in scenarios]
        if chunks < LONGEST:
            progress.print(
                f"This machine takes {pace:.1f} s for a chunk of full compute: {chunks} chunks of each drive "
                f"({chunks * per / FPS:.0f} seconds of video) take about "
                f"{max(1, round(seconds_of(chunks, pace, drives) / 60))} min. "
                f"For {LONGEST}, however long it takes: --chunks {LONGEST}."
            )
    progress.update(total, total=len(drives) * (chunks + 1) + 1, completed=1)
    every = options.every or (per if chunks <= _SHORT else 5 * per)
    metrics = Metrics(every=every, distance=distance, events=SHOWN)
    about = environment(model, checkpoint)
    for name in (*NAMES, *(f"{kind}-{told}" for kind in KINDS for told in (*TOLD, "plain"))):
        remove_rollouts(out, name)
    entries = [
        _run_drive(model, drive, scenario, out, options.seed, metrics, about, progress, total)
        for drive, scenario in zip(drives, scenarios, strict=True)
    ]
    report = {
        "scenarios": entries,
        "environment": about,
        "settings": {
            "chunks": chunks,
            "seed": options.seed,
            "cadence": options.cadence,
            "told": list(options.told),
            "every": every,
            "scenarios": list(options.scenarios),
            "fps": FPS,
        },
        "seconds": round(perf_counter() - started, 1),
    }
    write_json(out / "report.json", report)
    progress.update(total, description="drawing the page")
    build_page(out)
    return report


def seconds_of(chunks: int, pace: float, drives: Sequence[Drive]) -> float:
    """About how long drives of so many chunks take, where a chunk of full compute takes ``pace`` seconds."""
    return pace * sum(chunks * drive.steps + _DRIVE for drive in drives)


def affordable(pace: float, drives: Sequence[Drive], cycle: int) -> int:
    """The number of chunks of a drive for six minutes: whole cycles, from `SHORTEST` to `LONGEST` chunks.

    Args:
        pace: seconds of a chunk in full compute.
        drives: all that are to be driven.
        cycle: the number of chunks in a cycle.
    """
    chunks = (SECONDS / pace - _DRIVE * len(drives)) / sum(drive.steps for drive in drives)
    return min(LONGEST, max(SHORTEST, int(chunks // cycle) * cycle))


def _run_drive(
    model: WorldModel,
    drive: Drive,
    scenario: Scenario,
    out: Path,
    seed: int,
    metrics: Metrics,
    about: Mapping[str, Any],
    progress: Progress,
    total: TaskID,
) -> dict[str, Any]:
    at = moments(scenario.actions, model.sizes.window, MOMENTS)
    progress.update(total, description=f"{drive.title}: driving")
    named = {"drive": drive.title, "told": TOLD[drive.told]}
    with Race(model, scenario, drive.arms, seed=seed) as race:
        held = {name: list[int]() for name in race.runs}

        def advance() -> None:
            progress.advance(total)
            for name, run in race.runs.items():
                stats = run.stats()
                held[name].append(stats.bytes_held if stats else 0)

        reactions = run_race(race, scenario.actions, at=at, events=metrics.events, advance=advance)
        progress.update(total, description=f"{drive.title}: comparing")
        writer = _Writer(out, drive, scenario, seed, about)
        full, policies = race.base(drive.arms[0].name), []
        for name, run in race.runs.items():
            reference, other = race.reference(name), "full"
            if reference.loop is not full.loop:
                other = f"full-as-{name}"
                writer.write(reference, other, {})
            policies.append(named | describe(race, name, scenario, metrics, reactions[name]))
            writer.write(run, name, policies[-1], reference, other, held[name])
        policies.append(named | describe_full(full, scenario, metrics))
        writer.write(full, "full", policies[-1])
    progress.advance(total)
    return {
        "name": drive.name,
        "title": drive.title,
        "scenario": drive.scenario,
        "told": TOLD[drive.told],
        "frames": len(scenario.actions) * model.sizes.frames_per_latent,
        "actions": scenario.actions.tolist(),
        "reaction_measured_at": at,
        "policies": policies,
    }


@dataclass(frozen=True)
class _Writer:
    """Writes the rollouts of one drive."""

    out: Path
    drive: Drive
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
            scenario=self.drive.name,
            name=name,
            fps=FPS,
            policy=described(run.arm),
            reference=reference_name,
            block_share=figures.get("block_share"),
            pass_share=figures.get("pass_share"),
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

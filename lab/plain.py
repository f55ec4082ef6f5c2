"""The plain cadence, in which every chunk is committed: holding steps, fewer steps, no clean pass, and all together."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from holdover.method import Policy
from holdover.methods.light_interaction import CameraOverlap
from holdover.methods.registry import policy
from holdover.report.bound import amdahl_bound
from holdover.report.environment import environment
from holdover.report.progress import bar
from holdover.step import Step
from holdover_world.cli.common import Clips, Model, Seed, show
from holdover_world.conditioning.motion import drive
from holdover_world.config import FRAMES
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.scenarios import KINDS, Scenario, load_scenario, shipped_model
from holdover_world.measure.cards import write_card
from holdover_world.measure.evaluate import EVERY, SPANS, frechet
from holdover_world.measure.fidelity import Comparison, Video, compare
from holdover_world.measure.figures import HORIZONS, finite
from holdover_world.measure.race import Arm, ArmRun, Race, fork
from holdover_world.measure.reaction import EVENTS, Reaction, Responses, mean_ratio, measure, moments
from holdover_world.measure.stlpips import StLpips
from holdover_world.measure.timing import clock_blocks, cycles, speedup
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import FPS, stitch
from lab.cards import LAB, Out, Parts, run_script
from lab.plain_card import card
from lab.plots import plot_fronts

CHUNKS = 66  # 22 seconds
#: With a layout the model is shown where roads and cars are; without one it has the video alone.
LAYOUTS = ("layout", "no layout")
#: The run that everything is compared with.
FULL = "four passes"
PLAIN = LoopConfig(cadence="plain")
LAST_PASS = replace(PLAIN, kv="last_pass")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run the cadence: options of a method if there is one, and the loop's own choices.

    Attributes:
        kind: of the front that it belongs to.
        hold: options of `step_hold`; None for another method, or for none.
        familiar: it runs `light_interaction`, by the overlap of cameras.
    """

    name: str
    kind: str
    loop: LoopConfig = PLAIN
    hold: Mapping[str, Any] | None = None
    familiar: bool = False

    def arm(self, scenario: Scenario) -> Arm:
        """It in a scenario."""
        chosen: Policy | None = None
        if self.hold is not None:
            chosen = policy("step_hold", **self.hold)
        elif self.familiar:
            seen = CameraOverlap(poses=Poses(camera_poses(scenario)), frames=1, points=5000)
            chosen = policy("light_interaction", familiar=seen)
        return Arm(name=self.name, policy=chosen, loop=self.loop)


#: Runs that are raced together, beside full compute.
HEATS = (
    (
        Setting(name="hold 1, 2", kind="step_hold", hold={"hold": (1, 2)}),
        Setting(name="hold 1, 2, 3", kind="step_hold", hold={"hold": (1, 2, 3), "last": False}),
    ),
    (
        Setting(name="2 steps", kind="fewer steps", loop=replace(PLAIN, steps=2)),
        Setting(name="1 step", kind="fewer steps", loop=replace(PLAIN, steps=1)),
    ),
    (
        Setting(name="last pass's K/V", kind="last pass's K/V", loop=LAST_PASS),
        Setting(
            name="hold 1, 2, last pass's K/V",
            kind="step_hold, last pass's K/V",
            loop=LAST_PASS,
            hold={"hold": (1, 2), "last": False},
        ),
    ),
    (
        Setting(name="hold 1", kind="step_hold", hold={"hold": (1,)}),
        Setting(name="hold auto", kind="step_hold, auto", hold={"hold": "auto"}),
    ),
    (
        Setting(name="3 steps", kind="fewer steps", loop=replace(PLAIN, steps=3)),
        Setting(name="light_interaction", kind="light_interaction", familiar=True),
    ),
    (
        Setting(name="2 steps, last pass's K/V", kind="both", loop=replace(LAST_PASS, steps=2)),
        Setting(name="1 step, last pass's K/V", kind="both", loop=replace(LAST_PASS, steps=1)),
    ),
)


@dataclass(frozen=True)
class Poses:
    """The poses of all latent frames up to a step's chunk, ``[T, 4, 4]``."""

    poses: Tensor = field(repr=False)

    def __call__(self, step: Step) -> Tensor:
        return self.poses[: step.chunk + 1]


def camera_poses(scenario: Scenario) -> Tensor:
    """Where a camera that looks ahead is in each latent frame of a scripted drive, camera to world, in metres."""
    poses_T3 = drive(None, scenario.actions[None])[0][0, FRAMES - 1 :: FRAMES].double()
    x, y, yaw = poses_T3.unbind(1)
    made = torch.eye(4, dtype=torch.float64).repeat(len(x), 1, 1)
    none, one = torch.zeros_like(x), torch.ones_like(x)
    columns = (
        torch.stack((yaw.sin(), -yaw.cos(), none), 1),  # right
        torch.stack((none, none, -one), 1),  # down
        torch.stack((yaw.cos(), yaw.sin(), none), 1),  # ahead
        torch.stack((x, y, none), 1),
    )
    made[:, :3] = torch.stack(columns, 2)
    return made


def run_plain(
    model: WorldModel,
    out: Path,
    *,
    chunks: int = CHUNKS,
    scenarios: Sequence[str] = KINDS,
    layouts: Sequence[str] = LAYOUTS,
    seed: int = 0,
    clips: Path | None = None,
    checkpoint: Path | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Drive the plain cadence in every setting; writes ``plain.md``, ``.json`` and ``.png``.

    All runs of a heat are interleaved, beside full compute, and every drive has the first heat before any has the
    second. An interrupted measurement continues with the heat it was in; the card has all that are finished.

    Args:
        chunks: per drive, a third of a second each.
        scenarios: scripted drives.
        layouts: of `LAYOUTS`.
        clips: where the drives start.

    Raises:
        ValueError: there are too few chunks to time, or a clip is too short for them.
    """
    if chunks < 8:
        raise ValueError(f"chunks={chunks} are too few to time and to react in; give 8 or more")
    distance = StLpips()
    parts = Parts(out, "plain", model, clips=str(clips), chunks=chunks, seed=seed, heats=repr(HEATS))
    task = progress.add_task("plain", total=len(scenarios) * len(layouts) * len(HEATS) * chunks)
    share = parts.get("share", partial(_share, model, load_scenario(scenarios[0], model, clips=clips, chunks=8)))
    figures: dict[str, Any] = {
        "chunks": chunks,
        "seed": seed,
        "denoising_share": share,
        "environment": environment(model, checkpoint),
        "drives": [],
    }
    drives = [(name, layout) for layout in layouts for name in scenarios]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {drive: [] for drive in drives}
    for done, (number, (name, layout)) in enumerate(product(range(len(HEATS)), drives), 1):
        progress.update(task, description=f"{name}, {layout}, heat {number + 1}")
        scenario = load_scenario(name, model, clips=clips, chunks=chunks)
        if layout == "no layout":
            scenario = replace(scenario, track=None)
        run = partial(_run, model, scenario, HEATS[number], share, seed, distance, lambda: progress.advance(task))
        full, *others = parts.get(f"{name}, {layout}, {number}", run)
        rows[name, layout] += [*([] if rows[name, layout] else [full]), *others]
        progress.update(task, completed=done * chunks)
        gc.collect()  # a run and the hook on its model refer to each other; only the collector frees their memory
        figures["drives"] = [{"name": n, "layout": kind, "rows": own} for (n, kind), own in rows.items() if own]
        write_card(out, "plain", card(figures), figures)
        plot_fronts(out / "plain.png", {f"{d['name']}, {d['layout']}": front(d["rows"]) for d in figures["drives"]})
    parts.clear()
    return figures


def _share(model: WorldModel, scenario: Scenario) -> float:
    """The share of the DiT time that denoising passes take; the clean pass takes the rest."""
    loop = ClosedLoop(model, scenario.start, scenario.start_actions, config=PLAIN, track=scenario.track)
    with clock_blocks(model, whole=True) as passes:
        total = sum(piece.dit_seconds for piece in loop.run(scenario.actions))
    return passes.seconds / total


def _run(
    model: WorldModel,
    scenario: Scenario,
    heat: Sequence[Setting],
    share: float,
    seed: int,
    distance: StLpips,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """The rows of full compute and of a heat."""
    at = moments(scenario.actions, model.sizes.window, 1)
    arms = [Arm(name=FULL, loop=PLAIN), *(setting.arm(scenario) for setting in heat)]
    reactions: dict[str, list[Reaction]] = {arm.name: [] for arm in arms}
    with Race(model, scenario, arms, seed=seed) as race, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could reuse nothing")  # one of the results
        runs = {arm.name: race.runs.get(arm.name) or race.base(arm.name) for arm in arms}
        for g, action in enumerate(scenario.actions):
            if g in at:
                known: Responses = {}
                for name, run in runs.items():
                    full = fork(runs[FULL].loop, "reference")
                    reactions[name] += measure(run.loop, full, action, full_responses=known)
            race.step(action)
            advance()
        kinds = {FULL: FULL, **{setting.name: setting.kind for setting in heat}}
        return [
            describe(name, run, runs[FULL], scenario, reactions[name], share, distance) | {"kind": kinds[name]}
            for name, run in runs.items()
        ]


def describe(
    name: str,
    run: ArmRun,
    full: ArmRun,
    scenario: Scenario,
    reactions: Sequence[Reaction],
    share: float,
    distance: StLpips,
) -> dict[str, Any]:
    """The figures of one run, against four passes and against the simulator. The first chunk is not timed."""
    assert scenario.truth is not None, "a scripted drive was recorded"
    video = run.video()
    beside, true = compare(video, full.video(), every=EVERY), compare(video, scenario.truth, every=EVERY)
    stats, config = run.stats(), run.loop.config
    denoising = config.steps - (config.kv == "last_pass")
    computed = denoising * (1 - stats.skip) if stats else float(denoising)
    passes = {"denoising": computed, "writing": 1.0}
    bound = _bound(passes, config, share)
    seconds = {name: cycles(np.array(getattr(run, name)), 1) for name in ("dit_seconds", "end_to_end_seconds")}
    whole = {name: cycles(np.array(getattr(full, name)), 1) for name in seconds}
    of_whole = float(np.median(whole["dit_seconds"]) / np.median(whole["end_to_end_seconds"]))
    first, last = beside.psnr_at_ends(FRAMES, 5 * FPS)
    return {
        "name": name,
        "policy": repr(run.arm.policy) if run.arm.policy else None,
        "passes": passes,
        "dit_ms": 1e3 * float(np.median(seconds["dit_seconds"])),
        "end_to_end_ms": 1e3 * float(np.median(seconds["end_to_end_seconds"])),
        "speedup": speedup(whole["dit_seconds"], seconds["dit_seconds"]),
        "bound": bound,
        "end_to_end_speedup": speedup(whole["end_to_end_seconds"], seconds["end_to_end_seconds"]),
        "end_to_end_bound": amdahl_bound(of_whole, 1 - 1 / bound),
        "psnr_db": finite(beside.psnr()),
        "psnr_db_by_horizon": _by_horizon(beside),
        "psnr_db_first": finite(first),
        "psnr_db_last": finite(last),
        "ssim": beside.ssim["stitched"],
        "truth_db_by_horizon": _by_horizon(true),
        "lpips_by_horizon": _lpips(video, scenario.truth, distance),
        "frechet": _frechet(video, scenario.truth, distance),
        "detail": fmean(float(np.abs(np.diff(each.astype(np.int16), axis=2)).mean()) for each in video.values()),
        "reaction": {event.name: mean_ratio(reactions, event.name) for event in EVENTS},
    }


def front(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Per kind of setting (speed-up, PSNR in dB against four passes), without those that are equal to it."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["psnr_db"] is not None:
            kinds.setdefault(row["kind"], []).append((row["speedup"], row["psnr_db"]))
    return {kind: sorted(points) for kind, points in kinds.items()}


def _bound(passes: Mapping[str, float], config: LoopConfig, share: float) -> float:
    """What the passes that are left allow the DiT, if all denoising passes take as long, one that writes included."""
    each, clean = share / LoopConfig.steps, 1 - share
    return 1 / (passes["denoising"] * each + (clean if config.kv == "clean" else each))


def _by_horizon(comparison: Comparison) -> dict[str, float | None]:
    """PSNR in dB from the start over each of `HORIZONS`."""
    frames = len(comparison.errors["stitched"])
    return {
        str(seconds): finite(comparison.psnr(frames=slice(seconds * FPS)))
        for seconds in HORIZONS
        if seconds * FPS <= frames
    }


def _lpips(video: Video, truth: Video, distance: StLpips) -> dict[str, float]:
    """ST-LPIPS against the simulator of the stitched view, over the last half second before each of `HORIZONS`."""
    frames = len(next(iter(video.values())))
    found = {}
    for seconds in (each for each in HORIZONS if each * FPS <= frames):
        part = slice(seconds * FPS - FPS // 2, seconds * FPS, 2)
        views = [stitch({name: each[part] for name, each in some.items()}) for some in (video, truth)]
        found[str(seconds)] = fmean(distance(*views))
    return found


def _frechet(video: Video, truth: Video, distance: StLpips) -> list[dict[str, Any]]:
    """The Fréchet distance to the simulator's pictures of the same span, and between halves of the simulator's."""

    def embed(some: Video, part: slice) -> NDArray[np.float64]:
        return np.concatenate([distance.embedding(view[part]) for view in some.values()])

    frames, rows = len(next(iter(video.values()))), []
    for begin, end in ((begin, end) for begin, end in SPANS if end * FPS <= frames):
        part = slice(begin * FPS, end * FPS, EVERY)
        made, true = embed(video, part), embed(truth, part)
        rows.append(
            {"seconds": [begin, end], "frechet": frechet(made, true), "simulator": frechet(true[::2], true[1::2])}
        )
    return rows


def main(
    out: Out = LAB,
    model: Model = None,
    clips: Clips = None,
    chunks: Annotated[int, typer.Option(help="Per drive, a third of a second each.")] = CHUNKS,
    seed: Seed = 0,
    scenario: Annotated[list[str] | None, typer.Option(help="Only these; may be given more than once.")] = None,
    layout: Annotated[list[str] | None, typer.Option(help="'layout' or 'no layout'; by default both.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; by default what the machine is fast in.")
    ] = None,
) -> None:
    """Holding steps, fewer steps, no clean pass, and all together, in the cadence that commits every chunk."""
    path = model or shipped_model()
    weights = None if dtype is None else {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    with bar() as progress:
        figures = run_plain(
            WorldModel.load(path, dtype=weights),
            out,
            chunks=chunks,
            scenarios=tuple(scenario) if scenario else KINDS,
            layouts=tuple(layout) if layout else LAYOUTS,
            seed=seed,
            clips=clips,
            checkpoint=path,
            progress=progress,
        )
    show(out / "plain.md", figures)


if __name__ == "__main__":
    run_script(main)

"""Recording clips of the scripted driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from holdover_world.scene.clips import ClipWriter, clip_name, open_dataset
from holdover_world.simulator.driver import HOLD
from holdover_world.simulator.scenes import SCENARIOS

if TYPE_CHECKING:
    from holdover_world.simulator.render import Renderer


def record(
    scenario: str,
    clips: int,
    out: Path,
    *,
    seed: int = 0,
    frames: int = 240,
    depth: bool = True,
    workers: int = 1,
) -> list[Path]:
    """Record clips of the scripted driver into a folder.

    Finished clips are kept, so an interrupted recording continues where it stopped.

    Args:
        scenario: one of `SCENARIOS`.
        clips: the number of clips.
        out: the folder.
        seed: of the first clip; the others have the seeds after it.
        frames: video frames per clip.
        depth: whether to record depth.
        workers: processes that record side by side.

    Returns:
        The folders of all these clips.

    Raises:
        ImportError: Panda3D is missing; the message names the command that installs it.
        ValueError: an argument is wrong, or ``out`` holds clips of other cameras.
    """
    _check(scenario, clips, seed, frames, workers)
    import holdover_world.simulator.render  # noqa: F401  # fails before a folder is made if Panda3D is missing

    open_dataset(out)
    seeds = range(seed, seed + clips)
    missing = [number for number in seeds if not (out / clip_name(scenario, number) / "clip.json").exists()]
    with _progress(scenario, clips, clips - len(missing)) as advance:
        if workers == 1:
            for number in missing:
                record_clip(scenario, number, out, frames, depth)
                advance()
        else:
            # Spawned, because a forked process would share the parent's OpenGL context.
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                jobs = [pool.submit(record_clip, scenario, number, out, frames, depth) for number in missing]
                for job in as_completed(jobs):
                    job.result()
                    advance()
    return [out / clip_name(scenario, number) for number in seeds]


def record_clip(scenario: str, seed: int, out: Path, frames: int, depth: bool) -> Path:
    """Record one clip into an existing dataset folder and return the folder of the clip."""
    from holdover_world.simulator.simulator import Simulator

    simulator = Simulator(scenario, seed, renderer=_shared_renderer())
    with ClipWriter(out, scenario, seed, depth=depth) as writer:
        seen = simulator.reset()
        for number in range(frames):
            if number % HOLD == 0:
                command = simulator.command()  # from what the previous frame shows
            if number:
                seen = simulator.step(*command)
            ego = seen.ego
            motion, pose = (ego.speed, ego.curvature), (ego.x, ego.y, ego.yaw)
            writer.add(seen.rgb, seen.depth, command=command, motion=motion, pose=pose)
        return writer.finish(simulator.layout())


@cache
def _shared_renderer() -> Renderer:
    """One renderer per process, because opening one takes longer than a few frames."""
    from holdover_world.simulator.render import Renderer

    return Renderer()


def _check(scenario: str, clips: int, seed: int, frames: int, workers: int) -> None:
    if scenario not in SCENARIOS:
        raise ValueError(f"unknown scenario {scenario!r}: choose one of {', '.join(SCENARIOS)}")
    for name, value, least in (("clips", clips, 1), ("seed", seed, 0), ("frames", frames, 1), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}: give {least} or more")


@contextmanager
def _progress(scenario: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(f"recording {scenario}", total=total, completed=done)
        yield lambda: bar.advance(task)

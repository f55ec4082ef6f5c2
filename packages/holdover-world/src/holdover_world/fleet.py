"""Evaluate scenarios, seeds and drivers under several policies on a Ray cluster, by default on this machine.

Each episode runs in `holdover_world.env.drive_env`. A finished episode is written at once, so a run that was killed
continues with the rest. Ray repeats an episode whose worker died.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import ray
import yaml

from holdover.decision import WINDOW
from holdover_world.env.drive_env import Course, DriveEnv, shipped_course
from holdover_world.scene.vehicles import MAX_SPEED, normalise_action

# Any: these packages ship no useful types.
_arrow: Any = pyarrow
_parquet: Any = pyarrow.parquet
_ray: Any = ray
_yaml: Any = yaml

#: How often Ray repeats an episode whose worker died.
RETRIES = 3


def keep_lane(info: Mapping[str, Any], speed: float, chunk: int) -> tuple[float, float]:
    """Keep the speed and steer back to the centre line. Returns speed (m/s) and curvature (1/m)."""
    ahead = max(6.0, 1.5 * speed)
    return speed, -2 * (info["offset"] + ahead * math.sin(info["heading_error"])) / ahead**2


def straight_on(info: Mapping[str, Any], speed: float, chunk: int) -> tuple[float, float]:
    """Keep the speed and drive straight on."""
    return speed, 0.0


def brake(info: Mapping[str, Any], speed: float, chunk: int) -> tuple[float, float]:
    """`keep_lane` for eight chunks, then brake to a halt."""
    return (0.0 if chunk >= 8 else speed), keep_lane(info, speed, chunk)[1]


DRIVERS: dict[str, Callable[[Mapping[str, Any], float, int], tuple[float, float]]] = {
    "keep_lane": keep_lane,
    "straight_on": straight_on,
    "brake": brake,
}


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One episode to drive, of at most ``chunks`` chunks."""

    scenario: str
    seed: int
    driver: str
    policy: str
    chunks: int

    @property
    def key(self) -> str:
        """A file name, different for every episode."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.scenario}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def read_plan(path: Path, policies: Sequence[str]) -> list[Episode]:
    """The episodes of a YAML file: its ``scenarios`` times ``seeds`` times ``drivers``, under each policy.

    ``chunks`` is the greatest length of each.

    Raises:
        ValueError: a key is missing or unknown, or a value is not valid.
    """
    plan = _yaml.safe_load(path.read_text(encoding="utf-8"))
    wanted = {"scenarios", "seeds", "drivers", "chunks"}
    if not isinstance(plan, dict) or set(plan) != wanted:
        raise ValueError(f"{path} holds {sorted(plan) if isinstance(plan, dict) else plan!r}; give {sorted(wanted)}")
    lists = {name: plan[name] for name in ("scenarios", "seeds", "drivers")}
    for name, values in lists.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{name}={values!r} in {path}: give a list")
    for driver in lists["drivers"]:
        if driver not in DRIVERS:
            raise ValueError(f"driver {driver!r} in {path} is not one of {', '.join(DRIVERS)}")
    for name, numbers, least in (("seeds", lists["seeds"], 0), ("chunks", [plan["chunks"]], 1)):
        if not all(type(number) is int and number >= least for number in numbers):
            raise ValueError(f"{name}={plan[name]!r} in {path}: give whole numbers from {least}")
    return [
        Episode(scenario=str(scenario), seed=seed, driver=driver, policy=policy, chunks=plan["chunks"])
        for scenario, seed, driver, policy in itertools.product(*lists.values(), policies)
    ]


def drive_episode(course: Course, episode: Episode) -> dict[str, Any]:
    """Drive one episode. Returns its fields and its results, a row of the table.

    ``video`` is a digest of all frames: episodes with equal videos have equal digests.

    Raises:
        ValueError: the course has no such scenario or policy.
    """
    ahead = course.world.model.sizes.window - 1
    env = DriveEnv(episode.scenario, policy=episode.policy, planned=ahead, course=course)
    digest, reused, calls = hashlib.sha256(), 0, 0
    seen, info = env.reset(seed=episode.seed)
    speed = float(seen["ego"][0]) or MAX_SPEED / 3
    total, offset, seconds, over, steps = 0.0, 0.0, 0.0, False, 0
    for chunk in range(episode.chunks):
        # A driver intends what it would command in the chunks to come if it saw then what it sees now.
        commands = [DRIVERS[episode.driver](info, speed, chunk + n) for n in range(1 + ahead)]
        actions = [normalise_action(*command) for command in commands]
        _, reward, over, _, info = env.step(np.stack(actions) if ahead else actions[0])
        made = env.newest
        assert made is not None
        steps, total, seconds = steps + 1, total + reward, seconds + made.seconds
        offset = max(offset, abs(info["offset"]))
        reused += sum(d.reused for d in made.decisions)
        calls += sum(d.role == "denoise" and d.reason != WINDOW for d in made.decisions)
        for camera in sorted(made.frames):
            digest.update(np.ascontiguousarray(made.frames[camera]).tobytes())
        if over:
            break
    env.close()
    collided = info.get("gap", math.inf) <= 0
    return {
        **asdict(episode),
        "steps": steps,
        "reward": total,
        "left_lane": over and not collided,
        "collided": collided,
        "max_offset": offset,
        "skip": reused / calls,
        "ms_per_chunk": 1e3 * seconds / steps,
        "video": digest.hexdigest(),
    }


def run_fleet(
    episodes: Sequence[Episode],
    out: Path,
    *,
    workers: int | None = None,
    course: Callable[[], Course] = shipped_course,
    address: str | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Drive the episodes and write all results to ``out/results.parquet``, in the order of the episodes.

    Args:
        episodes: what to drive.
        out: the folder of the run. Episodes that are finished there are not driven again.
        workers: processes on this machine, 1 by default. Not with ``address``: that cluster has its own workers.
        course: returns the course to drive on. A worker calls it for each episode, so it should cache its result.
        address: ``host:port`` of a running Ray cluster on which holdover-world is installed. By default one is started.
        progress: called with the number of finished episodes and their total.

    Raises:
        ValueError: the course lacks a scenario or a policy, or no cluster answers at the address.
    """
    parts = out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    todo = [episode for episode in episodes if not (parts / f"{episode.key}.json").is_file()]
    progress(len(episodes) - len(todo), len(episodes))
    if todo:
        with _cluster(workers, address):
            for episode, row in _driven(todo, course):
                _write(parts / f"{episode.key}.json", json.dumps(row))
                todo.remove(episode)
                progress(len(episodes) - len(todo), len(episodes))
    rows = [json.loads((parts / f"{episode.key}.json").read_text()) for episode in episodes]
    results = out / "results.parquet"
    temporary = results.with_suffix(f".{os.getpid()}.partial")
    _parquet.write_table(_arrow.Table.from_pylist(rows), temporary)
    temporary.replace(results)
    return results


def _driven(todo: Sequence[Episode], course: Callable[[], Course]) -> Iterator[tuple[Episode, dict[str, Any]]]:
    """Episodes with their rows, in the order in which they finish."""
    task = _ray.remote(num_cpus=1, max_retries=RETRIES)(_drive_in_worker)
    running = {task.remote(course, episode): episode for episode in todo}
    while running:
        (done, *_), _ = _ray.wait(list(running))
        yield running.pop(done), _ray.get(done)


def _drive_in_worker(course: Callable[[], Course], episode: Episode) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)  # a worker has one core, and the number of threads changes rounding
    return drive_episode(course(), episode)


@contextmanager
def _cluster(workers: int | None, address: str | None) -> Iterator[None]:
    """Connect to the cluster at an address, or start one."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        count = 1 if workers is None else workers
        if count < 1:
            raise ValueError(f"workers={workers}: give at least 1")
        _ray.init("local", num_cpus=count, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    else:
        if workers is not None:
            raise ValueError(f"workers={workers} with address={address!r}: that cluster has its workers; leave one out")
        _knock(address)
        _ray.init(address=address, log_to_driver=False)
    try:
        yield
    finally:
        _ray.shutdown()


def _knock(address: str) -> None:
    """Check that somebody answers: without this Ray waits for two minutes and then ends the process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(
            f"address={address!r}: no Ray cluster answers there ({error}); give host:port of `ray start --head`"
        ) from error


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

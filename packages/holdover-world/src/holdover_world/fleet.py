"""Evaluate many scenarios, seeds and drivers under many policies, on a Ray cluster: on this machine by default.

A rollout is one episode of `holdover_world.env.drive_env`. Each that finishes is written at once, so that a run which is
killed goes on with those that are left; a rollout whose worker dies is run again by Ray.
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

from holdover_world.env.drive_env import Course, DriveEnv, shipped_course
from holdover_world.scene.vehicles import MAX_SPEED, normalise_action

# Typed loosely: these ship no types that help.
_arrow: Any = pyarrow
_parquet: Any = pyarrow.parquet
_ray: Any = ray
_yaml: Any = yaml

#: Times that Ray runs a rollout again whose worker died.
RETRIES = 3


def keep_lane(info: Mapping[str, Any], speed: float, chunk: int) -> tuple[float, float]:
    """Speed (m/s) and curvature (1/m) that bring the car back to the middle at the speed it began with."""
    ahead = max(6.0, 1.5 * speed)
    return speed, -2 * (info["offset"] + ahead * math.sin(info["heading_error"])) / ahead**2


def straight_on(info: Mapping[str, Any], speed: float, chunk: int) -> tuple[float, float]:
    """The speed it began with, straight on."""
    return speed, 0.0


def brake(info: Mapping[str, Any], speed: float, chunk: int) -> tuple[float, float]:
    """As `keep_lane`, but from the eighth chunk on it brakes to a halt."""
    return (0.0 if chunk >= 8 else speed), keep_lane(info, speed, chunk)[1]


DRIVERS: dict[str, Callable[[Mapping[str, Any], float, int], tuple[float, float]]] = {
    "keep_lane": keep_lane,
    "straight_on": straight_on,
    "brake": brake,
}


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One episode to be driven, of so many chunks at most."""

    scenario: str
    seed: int
    driver: str
    policy: str
    chunks: int

    @property
    def key(self) -> str:
        """A file's name for it, another for every other rollout."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.scenario}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def read_plan(path: Path, policies: Sequence[str]) -> list[Episode]:
    """What a YAML file asks for: every combination of its ``scenarios``, ``seeds`` and ``drivers``, under each policy.

    ``chunks`` is how long each may be.

    Raises:
        ValueError: the file lacks one of these, has others, or names what there is not.
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


def drive(course: Course, rollout: Episode) -> dict[str, Any]:
    """Drive one rollout: its own fields, and what came of it, as a row of the results.

    ``video`` is a digest of every frame: equal rollouts have equal ones.

    Raises:
        ValueError: the course has no such scenario or policy.
    """
    env = DriveEnv(rollout.scenario, policy=rollout.policy, course=course)
    digest, reused, calls = hashlib.sha256(), 0, 0
    seen, info = env.reset(seed=rollout.seed)
    speed = float(seen["ego"][0]) or MAX_SPEED / 3
    total, offset, seconds, over, steps = 0.0, 0.0, 0.0, False, 0
    for chunk in range(rollout.chunks):
        command = DRIVERS[rollout.driver](info, speed, chunk)
        _, reward, over, _, info = env.step(normalise_action(*command))
        made = env.newest
        assert made is not None
        steps, total, seconds = steps + 1, total + reward, seconds + made.seconds
        offset = max(offset, abs(info["offset"]))
        reused += sum(not d.computed for d in made.decisions)
        calls += sum(d.role == "denoise" for d in made.decisions)
        for camera in sorted(made.frames):
            digest.update(np.ascontiguousarray(made.frames[camera]).tobytes())
        if over:
            break
    env.close()
    collided = info.get("gap", math.inf) <= 0
    return {
        **asdict(rollout),
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
    rollouts: Sequence[Episode],
    out: Path,
    *,
    workers: int | None = None,
    course: Callable[[], Course] = shipped_course,
    address: str | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Drive what is not driven yet, and write all results to ``out/results.parquet``, in the order of the rollouts.

    Args:
        rollouts: what to drive.
        out: the folder of the run; rollouts that finished in it are not driven again.
        workers: processes on this machine, 1 by default; with an address the cluster has its own.
        course: makes what workers drive on; called for each rollout, so it should remember what it made.
        address: of a Ray cluster that runs already, ``host:port``; Holdover is installed there.
        progress: is told how many are done, of how many.

    Raises:
        ValueError: a rollout asks for what the course has not, or no cluster is at the address.
    """
    parts = out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    todo = [rollout for rollout in rollouts if not (parts / f"{rollout.key}.json").is_file()]
    progress(len(rollouts) - len(todo), len(rollouts))
    if todo:
        with _cluster(workers, address):
            for rollout, row in _driven(todo, course):
                _write(parts / f"{rollout.key}.json", json.dumps(row))
                todo.remove(rollout)
                progress(len(rollouts) - len(todo), len(rollouts))
    rows = [json.loads((parts / f"{rollout.key}.json").read_text()) for rollout in rollouts]
    results = out / "results.parquet"
    temporary = results.with_suffix(f".{os.getpid()}.partial")
    _parquet.write_table(_arrow.Table.from_pylist(rows), temporary)
    temporary.replace(results)
    return results


def _driven(todo: Sequence[Episode], course: Callable[[], Course]) -> Iterator[tuple[Episode, dict[str, Any]]]:
    """Rollouts as they finish."""
    task = _ray.remote(num_cpus=1, max_retries=RETRIES)(_drive_in_worker)
    running = {task.remote(course, rollout): rollout for rollout in todo}
    while running:
        (done, *_), _ = _ray.wait(list(running))
        yield running.pop(done), _ray.get(done)


def _drive_in_worker(course: Callable[[], Course], rollout: Episode) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)  # a worker has one core; and the same threads give the same frames
    return drive(course(), rollout)


@contextmanager
def _cluster(workers: int | None, address: str | None) -> Iterator[None]:
    """A cluster of our own, or the one there is."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        count = 1 if workers is None else workers
        if count < 1:
            raise ValueError(f"workers={workers}: give at least 1")
        _ray.init("local", num_cpus=count, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    else:
        if workers is not None:
            raise ValueError(f"workers={workers} with address={address!r}: the cluster has its own; leave one out")
        _knock(address)
        _ray.init(address=address, log_to_driver=False)
    try:
        yield
    finally:
        _ray.shutdown()


def _knock(address: str) -> None:
    """See that somebody answers, for which Ray would wait two minutes and then end the process."""
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

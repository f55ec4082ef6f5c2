"""The fleet on a Ray cluster of this machine: workers give the same results as this process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

pytest.importorskip("ray", reason="no Ray; pip install 'holdover-world[fleet]'")
from holdover_world.fleet import DRIVERS, Episode, drive_episode, keep_lane, read_plan, run_fleet
from holdover_world.scene.vehicles import EgoState, drive
from holdover_world.sessions.session import SessionChunk, WorldSession
from tests.holdover_world.env.small import fatal_course, small_course, straight

PLAN = "scenarios: [town, coast]\nseeds: [0, 1]\ndrivers: [keep_lane]\nchunks: 4\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "scenarios.yaml"
    path.write_text(text)
    return path


def test_a_plan_is_every_combination(tmp_path: Path) -> None:
    episodes = read_plan(write(tmp_path, PLAN.replace("[keep_lane]", "[brake, straight_on]")), ["eager", "never"])
    assert len(episodes) == 2 * 2 * 2 * 2
    assert len({episode.key for episode in episodes}) == 16
    assert episodes[0] == Episode(scenario="town", seed=0, driver="brake", policy="eager", chunks=4)
    for wrong, message in (
        ("[1]", r"holds \[1\]"),
        (PLAN + "more: 1", "more"),
        (PLAN.replace("keep_lane", "fly"), "driver 'fly'"),
        (PLAN.replace("[0, 1]", "[-1]"), "seeds="),
        (PLAN.replace("[0, 1]", "7"), "seeds=7"),
        (PLAN.replace("4", "0"), "chunks=0"),
    ):
        with pytest.raises(ValueError, match=message):
            read_plan(write(tmp_path, wrong), ["never"])


def test_the_lane_keeper_comes_back_to_the_middle() -> None:
    road, ego = straight(EgoState()), EgoState(y=1.2, yaw=0.1, speed=10.0)
    for chunk in range(30):
        offset, heading_error = road.beside(ego)
        speed, curvature = keep_lane({"offset": offset, "heading_error": heading_error}, 10.0, chunk)
        for _ in range(4):
            ego = drive(ego, speed, curvature)
    assert abs(ego.y) < 0.05
    assert abs(ego.yaw) < 0.01
    assert DRIVERS["brake"]({"offset": 0.0, "heading_error": 0.0}, 10.0, 8)[0] == 0


def test_a_driver_tells_what_it_intends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two latent frames a window: before it brakes, the driver says so; the lane keeper means to steer on."""
    told: list[tuple[list[float], list[list[float]]]] = []
    step = WorldSession.step

    def note(session: WorldSession, action: list[float], plan: list[list[float]]) -> SessionChunk:
        told.append((action, plan))
        return step(session, action, plan)

    monkeypatch.setattr(WorldSession, "step", note)
    for driver in ("brake", "straight_on"):
        told.clear()
        drive_episode(small_course(), Episode(scenario="town", seed=0, driver=driver, policy="never", chunks=10))
        speeds, planned = [action[0] for action, _ in told], [plan[0][0] for _, plan in told]
        assert len(told) == 10
        assert planned[:-1] == speeds[1:]  # an intention that is kept
        assert [len(plan) for _, plan in told] == [1] * 10
        assert (speeds[7] > 0, speeds[8], planned[7]) == ((True, 0, 0) if driver == "brake" else (True, *speeds[:2]))
        assert all(plan[0][1] == action[1] for action, plan in told)


def test_a_collision_does_not_count_as_leaving_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    step = WorldSession.step
    wall = {"front_wide": np.full((2, 32, 48), 0.5, np.float32)}  # half a metre before the camera, inside the car
    monkeypatch.setattr(WorldSession, "step", lambda session, *told: replace(step(session, *told), depth=wall))
    row = drive_episode(small_course(), Episode(scenario="town", seed=0, driver="brake", policy="never", chunks=3))
    assert (row["steps"], row["reward"], row["collided"], row["left_lane"]) == (1, -1, True, False)


def test_a_fleet_survives_its_workers_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDOVER_TEST_MARKER", str(tmp_path / "died"))
    episodes = read_plan(write(tmp_path, PLAN), ["eager"])
    torch.set_num_threads(1)
    here = [drive_episode(small_course(), episode) for episode in episodes]
    assert [row["steps"] for row in here] == [4] * 4
    # The result of an earlier run, with a reward that shows whether the episode is driven again.
    parts = tmp_path / "out" / "parts"
    parts.mkdir(parents=True)
    (parts / f"{episodes[1].key}.json").write_text(json.dumps({**here[1], "reward": 77.0}))
    told: list[tuple[int, int]] = []
    path = run_fleet(episodes, tmp_path / "out", course=fatal_course, progress=lambda done, of: told.append((done, of)))
    assert (tmp_path / "died").exists()  # a worker was killed in mid-run
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert [row["video"] for row in rows] == [row["video"] for row in here]
    assert [row["reward"] for row in rows] == [here[0]["reward"], 77.0, here[2]["reward"], here[3]["reward"]]
    assert [row["skip"] for row in rows] == [row["skip"] for row in here]
    assert len({row["video"] for row in rows}) == 4
    done = run_fleet(episodes, tmp_path / "out", course=fatal_course)  # nothing is left to do, so no cluster starts
    assert pyarrow.parquet.read_table(done).to_pylist() == rows


@pytest.fixture
def head() -> Iterator[str]:
    """The address of a cluster that runs in processes of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address", "127.0.0.1"),
        *("--port", address.rpartition(":")[2], "--num-cpus", "2", "--include-dashboard", "false"),
        *("--object-store-memory", str(80 * 2**20), "--disable-usage-stats"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        told = []
        for line in process.stdout:
            told.append(line)
            if "Ray runtime started" in line:
                break
        assert process.poll() is None, "".join(told)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_a_running_cluster_gives_the_same_results(tmp_path: Path, head: str) -> None:
    episodes = read_plan(write(tmp_path, PLAN.replace("[0, 1]", "[3]")), ["eager"])
    torch.set_num_threads(1)
    here = [drive_episode(small_course(), episode) for episode in episodes]
    rows = pyarrow.parquet.read_table(run_fleet(episodes, tmp_path, course=small_course, address=head)).to_pylist()
    assert [(row["video"], row["reward"]) for row in rows] == [(row["video"], row["reward"]) for row in here]


def test_an_address_without_a_cluster_is_refused_at_once(tmp_path: Path) -> None:
    episodes = read_plan(write(tmp_path, PLAN), ["eager"])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
    for address in (nobody, "junk", "127.0.0.1:99999"):
        with pytest.raises(ValueError, match=f"address='{address}': no Ray cluster answers there"):
            run_fleet(episodes, tmp_path, course=small_course, address=address)
    with pytest.raises(ValueError, match="workers=2 with address='127"):
        run_fleet(episodes, tmp_path, course=small_course, address=nobody, workers=2)
    with pytest.raises(ValueError, match="workers=0"):
        run_fleet(episodes, tmp_path, course=small_course, workers=0)

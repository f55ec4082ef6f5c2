"""Scenes, routes, traffic and the driver, without pictures."""

import math
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest

from holdover_world.scene.cameras import FPS
from holdover_world.scene.vehicles import MAX_CURVATURE, MAX_SPEED, EgoState, drive
from holdover_world.simulator.driver import HOLD, Driver
from holdover_world.simulator.roads import Lane, Route, arc, arc_lengths
from holdover_world.simulator.scenes import SCENARIOS, build_scene
from holdover_world.simulator.traffic import Junctions, Traffic, gap_ahead

_scene = cache(partial(build_scene, seed=0))  # driving leaves a scene as it is


def test_unknown_scenario() -> None:
    with pytest.raises(ValueError, match="'desert': choose one of urban, highway, uturn"):
        build_scene("desert", 0)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenes_depend_on_the_seed_alone(scenario: str) -> None:
    first, again, other = (
        scene.mesh.parts for scene in (_scene(scenario), build_scene(scenario, 0), build_scene(scenario, 1))
    )
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert first.keys() != other.keys() or any(not np.array_equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_lanes_join(scenario: str) -> None:
    lanes = _scene(scenario).lanes
    for lane in lanes:
        for successor in lane.successors:
            np.testing.assert_allclose(lane.points[-1], lanes[successor].points[0], atol=1e-6)


def test_a_route_measures_itself() -> None:
    quarter = arc((0.0, 10.0), 10.0, -math.pi / 2, 0.0, spacing=0.05)
    lanes = [
        Lane(points=np.array([(-20.0, 0.0), (0.0, 0.0)]), limit=10, successors=[1]),
        Lane(points=quarter, limit=5, junction=4),
    ]
    route = Route(lanes, 0, np.random.default_rng(0))
    assert route.at(10.0).tolist() == [-10.0, 0.0]
    assert route.at(20.0 + 5 * math.pi) == pytest.approx([10.0, 10.0], abs=1e-2)
    assert route.heading(10.0) == pytest.approx(0.0)
    assert route.lane_at(21.0)[0] == 1
    entry = route.next_junction(3.0)
    assert entry is not None
    assert entry[0] == pytest.approx(20.0)
    assert entry[2] == 4
    assert route.project(-5.0, 0.4, 13.0) == pytest.approx(15.0)
    beyond = route.at(25.0 + 5 * math.pi)
    assert beyond == pytest.approx([10.0, 15.0], abs=0.1)


def test_arc_lengths() -> None:
    assert arc_lengths(np.array([(0.0, 0.0), (3.0, 4.0), (3.0, 5.0)])).tolist() == [0.0, 5.0, 6.0]


def test_gap_to_what_stands_on_the_path() -> None:
    path = np.stack([np.arange(0.0, 60.0, 1.5), np.zeros(40)], axis=1)
    gap, speed = gap_ahead(path, np.array([(30.0, 1.0), (20.0, 4.0)]), np.array([(7.0, 0.0), (0.0, 0.0)]))
    assert gap == pytest.approx(30.0 - 1.5 - 2.25, abs=1.6)
    assert speed == pytest.approx(7.0)
    assert gap_ahead(path, np.array([(20.0, 4.0)]), np.zeros((1, 2))) == (math.inf, 0.0)
    assert gap_ahead(path, np.zeros((0, 2)), np.zeros((0, 2))) == (math.inf, 0.0)


def test_junctions_let_one_lane_cross_at_a_time() -> None:
    junctions = Junctions()
    assert junctions.request(1, car=0, lane=5)
    assert junctions.request(1, car=1, lane=5)
    assert not junctions.request(1, car=2, lane=6)
    assert junctions.request(2, car=2, lane=6)
    junctions.release(0)
    assert not junctions.request(1, car=2, lane=6)
    junctions.release(1)
    assert junctions.request(1, car=2, lane=6)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_driver_stays_in_bounds_and_repeats_itself(scenario: str) -> None:
    first, again = _drive(scenario, seed=5), _drive(scenario, seed=5)
    assert first == again
    for speed, curvature, _ in first:
        assert 0 <= speed <= MAX_SPEED
        assert abs(curvature) <= MAX_CURVATURE
    travelled = sum(math.dist(a[2][:2], b[2][:2]) for a, b in pairwise(first))
    assert travelled > 10


def test_u_turns_turn_round() -> None:
    turned = [abs(run[-1][2][2] - run[0][2][2]) for run in (_drive("uturn", seed) for seed in range(3))]
    assert max(turned) > 2.5


def _drive(scenario: str, seed: int, frames: int = 144) -> list[tuple[float, float, tuple[float, float, float]]]:
    """Commanded speed and curvature, and the pose they led to, every four frames."""
    scene = _scene(scenario)
    rng = np.random.default_rng(seed)
    lane, s = scene.starts[0]
    (x, y), (ahead_x, ahead_y) = Route(scene.lanes, lane, rng).at(np.array([s, s + 1.0]))
    ego = EgoState(x=float(x), y=float(y), yaw=math.atan2(ahead_y - y, ahead_x - x), speed=5.0)
    traffic = Traffic(scene, ego, rng)
    driver = Driver(scene, (lane, s), rng)
    log = []
    for _ in range(frames // HOLD):
        command = driver.command(ego, traffic)
        for _ in range(HOLD):
            ego = drive(ego, *command)
            traffic.step(ego, 1 / FPS)
        log.append((*command, (ego.x, ego.y, ego.yaw)))
    return log

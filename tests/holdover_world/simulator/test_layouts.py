"""Layouts of simulated scenes, and the palette that the simulator and the layouts share."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from holdover_world.scene.layout import METRES, Layout
from holdover_world.scene.palette import GROUNDS
from holdover_world.simulator.scenes import build_scene
from holdover_world.simulator.simulation import Simulation
from holdover_world.simulator.textures import mean_colour


@pytest.mark.parametrize("material", ["grass", "asphalt", "slabs"])
def test_ground_has_the_mean_colour_of_its_texture(material: str) -> None:
    """Bit for bit, so that recorded layouts are drawn as before."""
    assert GROUNDS[material] == mean_colour(material)


def ground_at(layout: Layout, x: float, y: float) -> str:
    column, row = ((torch.tensor([x, y]) - layout.corner_2) / METRES).floor().long().tolist()
    return list(GROUNDS)[int(layout.ground_GH[row, column])]


def test_a_town_is_drawn_as_it_was_built() -> None:
    """Places worked out by hand from the sizes in `holdover_world.simulator.town`."""
    simulation = Simulation("urban", 4)
    layout = simulation.layout()
    assert ground_at(layout, 83.0, 83.0) == "asphalt"  # the middle of a junction
    assert ground_at(layout, 83 + 15.0, 83.0) == "paint"  # the first dash of a street, from 14 to 18 metres
    assert ground_at(layout, 83 + 20.0, 83.0) == "asphalt"
    assert ground_at(layout, 83 + 30.0, 83 + 7.5) == "slabs"
    assert ground_at(layout, 83 + 30.0, 83 + 5.95) == "kerb"
    assert ground_at(layout, 83 + 41.5, 83 + 41.5) == "grass"  # behind the houses
    # A zebra crossing: stripes along the street, 0.8 metres wide, as many bright as dark.
    across = [ground_at(layout, 83 + 7.3, 83 + y) for y in np.arange(-5.7, 5.7, 0.2)]
    assert 0.4 < across.count("paint") / len(across) < 0.6
    assert sum(a != b for a, b in pairwise(across)) in range(12, 17)
    kinds = layout.boxes_M10[:, 6] - layout.boxes_M10[:, 5]
    assert int((kinds > 6).sum()) > 300  # houses without their shops
    assert layout.poses_TC3.shape == (1, len(simulation.traffic.cars), 3)


def test_a_layout_logs_where_the_cars_are() -> None:
    simulation = Simulation("highway", 3)
    for _ in range(5):
        simulation.step(20.0, 0.0)
    cars = [(car.x, car.y, car.yaw) for car in simulation.traffic.cars]
    layout = simulation.layout()
    torch.testing.assert_close(layout.cars([5])[0], torch.tensor(cars))
    assert len(layout.poses_TC3) == 6
    step = layout.poses_TC3[5] - layout.poses_TC3[4]
    beyond = layout.cars([9])[0]
    torch.testing.assert_close(beyond[:, :2], layout.poses_TC3[5, :, :2] + 4 * step[:, :2])
    assert torch.equal(beyond[:, 2], layout.poses_TC3[5, :, 2])


def test_the_road_without_bends_has_none() -> None:
    for lane in build_scene("straight", 2).lanes:
        assert np.ptp(lane.points[:, 1]) < 1e-9
    assert np.ptp(build_scene("highway", 2).lanes[0].points[:, 1]) > 5

"""The scenarios: their roads as lanes, and everything beside them as geometry.

A scene depends on its seed alone. Seeds change where things stand, not how they look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from holdover_world.simulator.long_roads import build_highway, build_uturn
from holdover_world.simulator.scenery import Scene
from holdover_world.simulator.town import build_town

_BUILDERS: Mapping[str, Callable[[np.random.Generator], Scene]] = {
    "urban": build_town,
    "highway": build_highway,
    "uturn": build_uturn,
    "straight": partial(build_highway, radius=math.inf),
}

#: The names of the scenarios.
SCENARIOS: tuple[str, ...] = tuple(_BUILDERS)


def build_scene(scenario: str, seed: int) -> Scene:
    """Build the scene of a scenario for a seed.

    Raises:
        ValueError: there is no such scenario.
    """
    if scenario not in _BUILDERS:
        raise ValueError(f"unknown scenario {scenario!r}: choose one of {', '.join(SCENARIOS)}")
    return _BUILDERS[scenario](np.random.default_rng([seed, 1]))

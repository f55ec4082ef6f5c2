"""What some methods must know of a model and its loop beforehand: TeaCache's polynomial, MagCache's magnitudes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from holdover.engine.attach import attach
from holdover.engine.cache import Cache
from holdover.methods.magcache import magnitude_ratios, measure_magnitudes
from holdover.methods.teacache import changes, measure_changes
from holdover.report.files import write_json
from holdover_world.loop.closed_loop import ClosedLoop, LoopConfig
from holdover_world.loop.scenarios import load_scenario
from holdover_world.model.transformer import WorldModel

#: Runs some chunks of the stream "default", every pass within a step of the attached cache.
Loop = Callable[[Cache], object]


def run_calibration(model: nn.Module, loop: Loop, out: Path, *, degree: int = 4, branch: str = "") -> dict[str, Any]:
    """Run the loop twice, computing everything, and write what was measured as JSON.

    Args:
        model: its first slot declares the tap ``modulated``.
        loop: some chunks; the same ones each time it is called, if possible.
        degree: of TeaCache's polynomial.
        branch: the guidance branch that is measured.

    Returns:
        The options for ``holdover.policy("teacache", ...)``, of all chunks, and for ``"magcache"``, of the last
        one, by name; and how well the polynomial fits: ``points`` and their ``rms_error``.

    Raises:
        ValueError: there are too few different points for the degree, or the last chunk is not finished.
    """
    with attach(model, measure_changes()) as cache:
        loop(cache)
        pairs = changes(cache.snapshot(), branch)
    with attach(model, measure_magnitudes()) as cache:
        loop(cache)
        ratios = magnitude_ratios(cache.snapshot(), branch)
    polynomial = fit(pairs, degree)
    moved, output_moved = np.array(pairs).T
    figures = {
        "teacache": {"polynomial": polynomial},
        "magcache": {"ratios": list(ratios)},
        "points": len(pairs),
        "rms_error": float(np.sqrt(np.mean((np.polyval(polynomial, moved) - output_moved) ** 2))),
    }
    write_json(out, figures)
    return figures


def fit(pairs: Sequence[tuple[float, float]], degree: int) -> list[float]:
    """Coefficients, highest power first, of the least-squares polynomial from input to output changes.

    Raises:
        ValueError: there are too few different inputs for the degree.
    """
    moved, output_moved = np.array(pairs).T
    different = len(np.unique(moved))
    if not 0 <= degree < different:
        raise ValueError(
            f"degree={degree} cannot be fitted to {different} different changes; run more steps or chunks, or "
            f"give a lower degree, 0 or more"
        )
    fitted = np.polynomial.Polynomial.fit(moved, output_moved, degree).convert().coef
    coefficients = np.zeros(degree + 1)
    coefficients[: len(fitted)] = fitted
    return [float(coefficient) for coefficient in coefficients[::-1]]


def world_loop(model: WorldModel, *, steps: int, chunks: int, seed: int, clips: Path | None) -> Loop:
    """Drives the world model through the start of the urban scenario."""
    scenario = load_scenario("urban", model, clips=clips, chunks=chunks)
    config = LoopConfig(steps=steps)

    def loop(cache: Cache) -> None:
        start = scenario.start, scenario.start_actions
        closed = ClosedLoop(model, *start, config=config, seed=seed, cache=cache, track=scenario.track)
        for action in scenario.actions:
            closed.step(action)

    return loop


def from_factory(path: str) -> tuple[nn.Module, Loop]:
    """What the function ``package.module:function`` returns: a model and its loop.

    Raises:
        ValueError: the path names no such function, or that returns something else.
    """
    module_name, _, name = path.partition(":")
    if not name:
        raise ValueError(f"factory={path!r} names no function; give package.module:function")
    factory = getattr(importlib.import_module(module_name), name, None)
    if not callable(factory):
        raise ValueError(f"factory={path!r}: module {module_name} has no function {name!r}")
    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
        raise ValueError(f"factory={path!r} returned {type(made).__name__}; return a model and a function of the cache")
    return made

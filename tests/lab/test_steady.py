"""The bench of steady drives: its PSNR against runs alone, its statistics against a closed form."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import holdover
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.scenarios import Scenario, load_scenario
from holdover_world.model.transformer import WorldModel
from lab.steady import drive, summary


def pixels(model: WorldModel, scenario: Scenario, cache: holdover.Cache | None) -> NDArray[np.float64]:
    """All pixels of every chunk ``[G, ...]``, by the driver alone."""
    loop = ClosedLoop(model, scenario.start, scenario.start_actions, seed=0, cache=cache, track=scenario.track)
    pieces = []
    for piece in loop.run(scenario.actions):
        frames = model.codec.decode(piece.latents, piece.before)
        pieces.append(np.concatenate([video.ravel() for video in frames.values()]).astype(float))
    return np.stack(pieces)


def test_a_drive_is_what_both_runs_show_alone(model: WorldModel, clips: Path) -> None:
    clip = next(clips.glob("urban-*"))
    found = drive(model, "urban-steady", clip, 20)
    scenario = load_scenario("urban-steady", model, clips=clips, chunks=20)
    full = pixels(model, scenario, None)
    with holdover.attach(model, holdover.xcache()) as cache:
        cached = pixels(model, scenario, cache)
        assert found["skip"] == cache.stats().skip > 0
    errors = np.square(cached - full).mean(1)

    def decibels(errors: NDArray[np.float64]) -> float:
        return 10 * math.log10(255**2 / errors.mean())

    assert found["clip"] == clip.name
    assert found["by_window"] == pytest.approx([decibels(errors[n : n + 4]) for n in range(0, 20, 4)])
    # Five seconds are 15 chunks, and so four windows.
    assert found["first"] == pytest.approx(decibels(errors[:16]))
    assert found["last"] == pytest.approx(decibels(errors[-16:]))


def test_the_mean_change_its_error_and_the_scatter_of_windows() -> None:
    one = {"first": 50.0, "last": 50.2, "by_window": [50.0, 50.2]}
    two = {"first": 50.0, "last": 49.8, "by_window": [50.0, 49.8]}
    found = summary([one, two])
    assert found["change"] == pytest.approx(0)
    assert found["standard_error"] == pytest.approx(0.2)  # deviation 0.2·√2 of two drives, over √2
    assert found["windows"] == pytest.approx(0.2 / math.sqrt(2))

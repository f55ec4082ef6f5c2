"""The bench of the plain cadence: its figures against runs alone, its bounds and verdicts by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import holdover
from holdover.report.progress import bar
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.scenarios import Scenario, load_scenario
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.vehicles import normalise_action
from lab import plain
from lab.plain import HEATS, PLAIN, _bound, camera_poses, front, run_plain
from lab.plain_card import _faults


def pixels(model: WorldModel, scenario: Scenario, config: LoopConfig, cache: Any = None) -> NDArray[np.float64]:
    """All pixels of every chunk ``[G, ...]``, by the driver alone."""
    start = scenario.start, scenario.start_actions
    loop = ClosedLoop(model, *start, config=config, cache=cache, track=scenario.track)
    pieces = []
    for piece in loop.run(scenario.actions):
        frames = model.codec.decode(piece.latents, piece.before)
        pieces.append(np.concatenate([video.ravel() for video in frames.values()]).astype(float))
    return np.stack(pieces)


def test_the_figures_are_those_of_runs_alone(model: WorldModel, clips: Path, tmp_path: Path) -> None:
    with bar() as progress:
        figures = run_plain(
            model, tmp_path, chunks=8, scenarios=("urban",), layouts=("layout",), clips=clips, progress=progress
        )
    rows = {row["name"]: row for row in figures["drives"][0]["rows"]}
    assert list(rows) == ["four passes", *(setting.name for heat in HEATS for setting in heat)]
    passes = {name: row["passes"]["denoising"] + row["passes"]["writing"] for name, row in rows.items()}
    assert {name: passes[name] for name in ("four passes", "hold 1", "hold 1, 2", "hold 1, 2, 3")} == {
        "four passes": 5,
        "hold 1": 4,
        "hold 1, 2": 3,
        "hold 1, 2, 3": 2,
    }
    assert [passes[f"{n} steps"] for n in (3, 2)] == [4, 3]
    assert (passes["last pass's K/V"], passes["1 step, last pass's K/V"]) == (4, 1)
    assert passes["hold 1, 2, last pass's K/V"] == 2

    scenario = load_scenario("urban", model, clips=clips, chunks=8)
    full = pixels(model, scenario, PLAIN)
    with holdover.attach(model, holdover.policy("step_hold")) as cache:
        held = pixels(model, scenario, PLAIN, cache)
    fewer = pixels(model, scenario, LoopConfig(cadence="plain", steps=2))
    for name, made in (("hold 1, 2", held), ("2 steps", fewer)):
        error = np.square(made - full).mean()
        assert rows[name]["psnr_db"] == pytest.approx(10 * math.log10(255**2 / error), abs=0.01)
        early = np.square(made[:3] - full[:3]).mean()  # a second is three chunks
        assert rows[name]["psnr_db_by_horizon"]["1"] == pytest.approx(10 * math.log10(255**2 / early), abs=0.01)
    assert rows["four passes"]["psnr_db"] is None
    text = (tmp_path / "plain.md").read_text()
    assert "in float32, 8 chunks" in text
    assert "| hold 1, 2 | 3.00 |" in text
    assert (tmp_path / "plain.png").is_file()
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_run_continues_with_the_heat_it_was_in(
    model: WorldModel, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "HEATS", (HEATS[0][:1], HEATS[1][1:]))
    begun, run = [], plain._run

    def once(model: WorldModel, scenario: Scenario, heat: Any, *more: Any) -> Any:
        begun.append(heat[0].name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return run(model, scenario, heat, *more)

    monkeypatch.setattr(plain, "_run", once)
    told: dict[str, Any] = {"chunks": 8, "scenarios": ("highway",), "layouts": ("no layout",), "clips": clips}
    with bar() as progress, pytest.raises(KeyboardInterrupt):
        run_plain(model, tmp_path, **told, progress=progress)
    with bar() as progress:
        figures = run_plain(model, tmp_path, **told, progress=progress)
    assert begun == ["hold 1, 2", "1 step", "1 step"]
    assert [row["name"] for row in figures["drives"][0]["rows"]] == ["four passes", "hold 1, 2", "1 step"]
    with bar() as progress, pytest.raises(ValueError, match="chunks=4 are too few"):
        run_plain(model, tmp_path, chunks=4, clips=clips, progress=progress)


def test_bounds_by_hand() -> None:
    """Denoising passes take 80 % of the time: 20 % each, as much as the clean pass."""
    writing, last = PLAIN, LoopConfig(cadence="plain", kv="last_pass")
    assert _bound({"denoising": 4.0}, writing, 0.8) == pytest.approx(1)
    assert _bound({"denoising": 2.0}, writing, 0.8) == pytest.approx(5 / 3)
    assert _bound({"denoising": 3.0}, last, 0.8) == pytest.approx(5 / 4)
    assert _bound({"denoising": 1.0}, last, 0.8) == pytest.approx(5 / 2)


def test_a_front_has_the_settings_of_a_kind_by_speed() -> None:
    rows = [
        {"kind": "a", "speedup": 2.0, "psnr_db": 50.0},
        {"kind": "a", "speedup": 1.5, "psnr_db": 60.0},
        {"kind": "b", "speedup": 1.0, "psnr_db": None},
    ]
    assert front(rows) == {"a": [(1.5, 60.0), (2.0, 50.0)]}


def test_what_is_farther_or_slower_to_react_is_named() -> None:
    full = {"truth_db_by_horizon": {"1": 25.0, "2": 24.0}}
    row = {
        "truth_db_by_horizon": {"1": 24.95, "2": 23.8},
        "reaction": {"brake": 1.0, "lane_change": 0.95, "steer": None},
    }
    assert _faults(row, full) == ["0.20 dB farther over 2 s", "lane change 0.950"]


def test_the_camera_looks_along_the_road() -> None:
    """At a constant speed straight on, poses stand in a line; on a bend to the left the camera turns left."""
    straight = torch.from_numpy(normalise_action(9.0, 0.0)).expand(3, 2)
    left = torch.from_numpy(normalise_action(9.0, 0.05)).expand(3, 2)
    poses, bent = (camera_poses(scenario(actions)) for actions in (straight, left))
    apart = poses[1:, :3, 3] - poses[:-1, :3, 3]
    torch.testing.assert_close(apart, torch.tensor([[3.0, 0, 0]] * 2).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(poses[2, :3, 2], torch.tensor([1.0, 0, 0]).double())  # ahead
    torch.testing.assert_close(poses[2, :3, 1], torch.tensor([0.0, 0, -1]).double())  # down
    assert bent[2, 1, 2] > 0  # y lies to the left
    torch.testing.assert_close(torch.linalg.det(bent[:, :3, :3]), torch.ones(3).double())


def scenario(actions: torch.Tensor) -> Scenario:
    nothing = torch.zeros(1, 1, 1, 1)
    return Scenario(name="x", start=nothing, start_actions=nothing[..., 0], actions=actions, truth={})

"""The PPO run: what it learns from, that it learns, goes on and repeats; on a random model, for a few steps."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.monitor import Monitor

from holdover_world.env.drive_env import DriveEnv, course_of
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import RIG
from lab.ppo import POLICIES, make_env, run, summary, train
from tests.holdover_world.small import small_config, small_model

FEW = {"n_steps": 8, "batch_size": 16, "n_epochs": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one camera. It draws no depth: at random that is a collision at once."""
    path = tmp_path_factory.mktemp("model")
    sizes = small_config(channels=16, layers=2, heads=1, cameras=RIG[:1], depth_channels=0, window=4)
    small_model(sizes=sizes).save(path)
    return path


def test_what_the_agent_is_shown_and_what_it_may_do(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[Any, Any]] = []  # of the environment within: actions, and what they led to
    step = DriveEnv.step

    def noted(self: DriveEnv, action: Any) -> Any:
        steps.append((action, step(self, action)))
        return steps[-1][1]

    monkeypatch.setattr(DriveEnv, "step", noted)
    env = make_env(course_of(WorldModel.load(checkpoint)), "highway", "never", "front_wide")
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (2,))
    env.reset(seed=1)
    spaces: Any = env.unwrapped.observation_space
    assert spaces["lane"].high == pytest.approx([1.75, np.pi / 2])
    for normalised, speed, turn in (([-1, 0], 0.0, 0.0), ([0, 1], 0.5, 1.0), ([1, -0.5], 1.0, -0.5)):
        shown, *_ = env.step(np.array(normalised, np.float32))
        action, (seen, *_, info) = steps[-1]
        assert action.tolist() == pytest.approx([speed, turn])
        assert shown["ego"] == pytest.approx(seen["ego"] / spaces["ego"].high, rel=1e-5)
        assert shown["lane"] == pytest.approx(np.clip([info["offset"] / 1.75, info["heading_error"] / 0.2], -1, 1))
        assert (shown["front_wide"] == seen["front_wide"]).all()
        assert shown in env.observation_space


@pytest.mark.filterwarnings("ignore:.*could reuse nothing")  # as it may be in so few chunks
def test_a_run_goes_on_where_it_was(checkpoint: Path, tmp_path: Path) -> None:
    first = run(checkpoint, tmp_path, tmp_path / "runs", steps=64, seed=3, scenario="urban", **FEW)
    longer = run(checkpoint, tmp_path, tmp_path / "runs", steps=96, seed=3, scenario="urban", **FEW)
    for policy in POLICIES:
        before, after = first["policies"][policy]["curve"], longer["policies"][policy]["curve"]
        assert len(before) > 0
        assert after[: len(before)] == before
        assert all(64 < at <= 96 for at, _, _ in after[len(before) :])
        log = json.loads((tmp_path / "runs" / policy / "log.json").read_text())
        assert log["chunks"] == 96 - len(after)  # what an episode's last step made is not kept
        assert log["computed"] + log["reused"] == log["chunks"] * 4 * 2  # passes, blocks
    assert longer["policies"]["never"]["skip"] == 0
    assert json.loads((tmp_path / "ppo.json").read_text()) == longer
    assert f"| `never` | {len(after)} |" in (tmp_path / "ppo.md").read_text()
    assert (tmp_path / "ppo.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"has an agent of .*'seed': 3.*, not of .*'seed': 4"):
        run(checkpoint, tmp_path, tmp_path / "runs", steps=96, seed=4, scenario="urban", **FEW)


def test_the_same_seed_gives_the_same_episodes(checkpoint: Path, tmp_path: Path) -> None:
    make = partial(make_env, course_of(WorldModel.load(checkpoint)), "highway", "never", "front_wide")
    logs = [train(make, tmp_path / str(n), steps=32, task={"seed": seed}, **FEW) for n, seed in enumerate((1, 1, 2))]
    assert logs[0]["episodes"] == logs[1]["episodes"] != logs[2]["episodes"]


class Target(gymnasium.Env[dict[str, Any], Any]):
    """Eight steps; each is worth one less the distance of the action to what is shown."""

    observation_space = gymnasium.spaces.Dict({"ego": gymnasium.spaces.Box(-1, 1, (1,))})
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    newest = None

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        return self.show(), {}

    def show(self) -> dict[str, Any]:
        self.shown = self.np_random.choice([-0.8, 0.8], 1).astype(np.float32)
        return {"ego": self.shown}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        reward = 1 - float(abs(action - self.shown)[0])
        return self.show(), reward, False, False, {}


def test_it_learns(tmp_path: Path) -> None:
    def make() -> gymnasium.Env[Any, Any]:
        return Monitor(gymnasium.wrappers.TimeLimit(Target(), 8))

    figures = summary(train(make, tmp_path, steps=3072, task={"seed": 0}, noise=(0.4, 0.2), learning_rate=2e-3))
    assert figures["return_first"] == pytest.approx(8 * 0.2, abs=0.8)  # it stays near zero, 0.8 off each time
    assert figures["return_last"] > 8 * 0.4  # no action that does not look at what is shown is worth more than 0.2
    assert figures["kept_last"] == 1

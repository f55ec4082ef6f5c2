r"""PPO learns to keep the lane inside the world model, with and without X-Cache, from the same seed.

    holdover world train --data data/train --heldout data/heldout --out runs/one-camera \
        --size tiny --camera front_wide --steps 2500 --batch 8
    python -m lab.ppo --model runs/one-camera

The agent (stable-baselines3, `pip install 'holdover-world[rl]'`) sees one camera, its own speed and curvature, and
where in the lane it is. It is saved under ``--runs`` after every update. An interrupted run continues from there, with
new episodes. Writes ``ppo.md``, ``ppo.json`` and ``ppo.png``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np
import typer
from gymnasium.wrappers import RescaleAction, TransformObservation
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from holdover.report.environment import environment
from holdover.report.files import whole, write_json
from holdover.report.tables import markdown
from holdover_world.cli.common import show
from holdover_world.env.drive_env import ID, Course, course_of
from holdover_world.loop.scenarios import shipped_model
from holdover_world.measure.cards import about, write_card
from holdover_world.model.transformer import WorldModel
from lab.cards import LAB, Out, run_script
from lab.plots import plot_returns

#: The reactive gate, because the agent learns from how the world reacts to it; and no cache.
POLICIES = ("xcache_reactive", "never")
CARS = 4  # driven at once, between updates
OVER = 50  # episodes that a mean is taken over
HEADING = 0.2  # radians off the lane's heading; the agent sees larger ones as this
#: Steps are per car and update; episodes last 60 at most.
PPO_OPTIONS: dict[str, Any] = {"n_steps": 128, "batch_size": 128, "n_epochs": 5, "gamma": 0.95, "learning_rate": 7e-4}
#: Standard deviation of actions at the beginning and at the end, geometric in between, as a share of their range. The
#: learning rate falls with it. With less noise at the beginning the agent finds nothing out; with this much the car
#: leaves the lane in some fifteen steps.
NOISE = (0.1, 0.02)


def make_env(course: Course, scenario: str | None, policy: str, camera: str) -> gymnasium.Env[Any, Any]:
    """The environment for a network: actions and numbers in [-1, 1]; returns are recorded."""
    env = gymnasium.make(ID, course=course, scenario=scenario, policy=policy, cameras=[camera])
    space = env.observation_space
    assert isinstance(space, gymnasium.spaces.Dict)
    ego, lane = (space[name].high for name in ("ego", "lane"))  # type: ignore[attr-defined]
    most = {"ego": ego, "lane": np.array([lane[0], HEADING], np.float32)}
    scaled = gymnasium.spaces.Dict({**space, **{name: gymnasium.spaces.Box(-1, 1, (2,)) for name in most}})

    def scale(seen: dict[str, Any]) -> dict[str, Any]:
        return {**seen, **{name: np.clip(seen[name] / most[name], -1, 1) for name in most}}

    env = TransformObservation(env, scale, scaled)
    return Monitor(RescaleAction(env, np.float32(-1), np.float32(1)))


def train(
    make: Callable[[], gymnasium.Env[Any, Any]],
    folder: Path,
    *,
    steps: int,
    task: dict[str, Any],
    noise: tuple[float, float] = NOISE,
    **changes: Any,
) -> dict[str, Any]:
    """Train an agent for a number of steps in all, or continue with the one in ``folder``; returns its log.

    Args:
        make: makes the environment of one car.
        folder: for the agent and its log.
        steps: of all cars together, rounded up to whole updates.
        task: the ``seed``, and everything else that a saved agent must agree in to continue.
        noise: of actions, at the beginning and at the end.
        changes: to `PPO_OPTIONS`, for a new agent.

    Returns:
        ``episodes``: for each the steps of all cars when it ended, its return, and whether the lane was kept.
        ``reused`` and ``computed``: block calls of denoising passes. ``seconds`` in the model, and ``chunks``.

    Raises:
        ValueError: the agent in the folder was trained on another task.
    """
    cars = DummyVecEnv([make] * CARS)
    agent_file, log_file = folder / "agent.zip", folder / "log.json"
    log: dict[str, Any] = {"task": task, "episodes": [], "reused": 0, "computed": 0, "seconds": 0.0, "chunks": 0}
    if agent_file.is_file():
        log = json.loads(log_file.read_text(encoding="utf-8"))
        if log["task"] != task:
            raise ValueError(f"{folder} has an agent of {log['task']}, not of {task}; remove it or choose other --runs")
        agent = PPO.load(agent_file, env=cars, device="cpu")
        # The log is written first: after a kill in between, it has episodes that the agent has not seen.
        log["episodes"] = [episode for episode in log["episodes"] if episode[0] <= agent.num_timesteps]
    else:
        agent = PPO("MultiInputPolicy", cars, seed=task["seed"], device="cpu", **{**PPO_OPTIONS, **changes})
    cars.seed(task["seed"] + agent.num_timesteps)

    def note(now: dict[str, Any], _: dict[str, Any]) -> bool:
        for info in now["infos"]:
            if "episode" in info:
                kept = bool(info["TimeLimit.truncated"])
                log["episodes"].append([agent.num_timesteps, float(info["episode"]["r"]), kept])
        for made in cars.get_attr("newest"):
            if made is not None:  # None where an episode has just ended
                denoising = [d.computed for d in made.decisions if d.role == "denoise"]
                log["computed"] += sum(denoising)
                log["reused"] += len(denoising) - sum(denoising)
                log["seconds"] += made.seconds
                log["chunks"] += 1
        return True

    while agent.num_timesteps < steps:
        spread = noise[0] * (noise[1] / noise[0]) ** (agent.num_timesteps / steps)
        agent.policy.log_std.data.fill_(math.log(spread))
        rate = agent.learning_rate * spread / noise[0]
        agent.lr_schedule = partial(_constant, rate)
        agent.learn(agent.n_steps * CARS, callback=note, reset_num_timesteps=False)
        write_json(log_file, log)
        with whole(agent_file) as temporary:
            agent.save(temporary)
        print(f"{folder.name}: {agent.num_timesteps} steps, {summary(log)}", flush=True)
    cars.close()
    return log


def _constant(value: float, _: float) -> float:
    return value


def summary(log: dict[str, Any]) -> dict[str, float | None]:
    """A log in a few figures; None where there is nothing to average."""
    episodes, calls = log["episodes"], log["reused"] + log["computed"]

    def mean(some: list[list[Any]], column: int) -> float | None:
        return float(np.mean([episode[column] for episode in some])) if some else None

    return {
        "episodes": len(episodes),
        "return_first": mean(episodes[:OVER], 1),
        "return_last": mean(episodes[-OVER:], 1),
        "kept_first": mean(episodes[:OVER], 2),
        "kept_last": mean(episodes[-OVER:], 2),
        "skip": log["reused"] / calls if calls else None,
        "ms_per_chunk": 1e3 * log["seconds"] / log["chunks"] if log["chunks"] else None,
    }


def run(
    checkpoint: Path, out: Path, runs: Path, *, steps: int, seed: int, scenario: str | None, **changes: Any
) -> dict[str, Any]:
    """Train under every policy and write the card; returns its figures."""
    course = course_of(WorldModel.load(checkpoint), POLICIES)
    camera = course.world.model.sizes.cameras[0].name
    task = {"seed": seed, "scenario": scenario, "model": course.world.digest}
    logs = {}
    for policy in POLICIES:
        make = partial(make_env, course, scenario, policy, camera)
        logs[policy] = train(make, runs / policy, steps=steps, task=task, **changes)
    surroundings = environment(course.world.model, checkpoint)
    figures = {
        "steps": steps, "seed": seed, "scenario": scenario, "camera": camera, "on": surroundings,
        "policies": {policy: {**summary(log), "curve": log["episodes"]} for policy, log in logs.items()},
    }  # fmt: skip
    curves = {policy: [(at, total) for at, total, _ in log["episodes"]] for policy, log in logs.items()}
    plot_returns(out / "ppo.png", curves, over=OVER)
    write_card(out, "ppo", card(figures), figures)
    return figures


def card(figures: dict[str, Any]) -> str:
    """The Markdown of a result."""
    forms = {"return_first": ".2f", "return_last": ".2f", "kept_first": ".0%", "kept_last": ".0%", "skip": ".1%"}
    forms["ms_per_chunk"] = ".0f"
    columns = "policy of the world", "episodes", "return, first", "last", "kept the lane, first", "last", "skip"
    rows = [
        (
            f"`{policy}`",
            str(row["episodes"]),
            *("–" if row[name] is None else format(row[name], form) for name, form in forms.items()),
        )
        for policy, row in figures["policies"].items()
    ]
    return f"""# PPO inside the world model

`python -m lab.ppo`: {figures["steps"]} steps of `holdover/Drive-v1` from seed {figures["seed"]},
{figures["scenario"] or "all scenarios"}, from the pictures of `{figures["camera"]}`, the car's own motion and its place
in the lane. First and last {OVER} episodes; an episode keeps the lane if it lasts to its end, 60 steps.

![returns](ppo.png)

{markdown((*columns, "ms per chunk"), rows)}
{about(figures["on"])}
"""


def main(
    model: Annotated[Path | None, typer.Option(help="A checkpoint. Its first camera is what the agent sees.")] = None,
    out: Out = LAB,
    runs: Annotated[Path, typer.Option(help="The folder of the agents.")] = Path("runs/ppo"),
    steps: Annotated[int, typer.Option(help="Of all cars together.")] = 16_000,
    seed: Annotated[int, typer.Option(help="Of agent and episodes.")] = 0,
    scenario: Annotated[str, typer.Option(help="urban, highway or uturn.")] = "highway",
) -> None:
    """PPO learns to keep the lane inside the world model, with and without X-Cache."""
    figures = run(model or shipped_model(), out, runs, steps=steps, seed=seed, scenario=scenario)
    show(out / "ppo.md", figures)


if __name__ == "__main__":
    run_script(main)

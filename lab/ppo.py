r"""PPO is trained to keep the lane inside the world model, with and without X-Cache, from the same seed.

    holdover world train --data data/train --heldout data/heldout --out runs/one-camera \
        --size tiny --camera front_wide --steps 2500 --batch 8
    python benchmarks/ppo.py --model runs/one-camera

The agent (stable-baselines3, `pip install 'holdover[rl]'`) sees one camera, its own speed and curvature, and where in
the lane it is. What was learnt is kept under ``--runs`` after every update: a run that was killed
goes on from there, with new episodes. Writes ``ppo.md``, ``ppo.json`` and ``ppo.png``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import RescaleAction, TransformObservation
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from holdover.report.files import whole, write_json
from holdover.report.plots import plot_returns
from holdover_world.env.drive_env import ID, Course, course_of
from holdover_world.loop.scenarios import shipped_model
from holdover_world.measure.measure import environment
from holdover_world.model.transformer import WorldModel
from lab.cards import about, write_card

#: The reactive gate, because a policy is trained on what it does to the world; and no cache.
POLICIES = ("xcache_reactive", "never")
CARS = 4  # driven by the agent as it stands, between updates
OVER = 50  # episodes of a mean
HEADING = 0.2  # radians off the lane's heading that are as good as any more
#: Steps are per car and update; episodes last 60 at most.
PPO_OPTIONS: dict[str, Any] = {"n_steps": 128, "batch_size": 128, "n_epochs": 5, "gamma": 0.95, "learning_rate": 7e-4}
#: Standard deviation of actions at the beginning and at the end, geometric in between, as a share of their range; the
#: learning rate falls with it. With less than the first nothing is found out, and the first leaves the lane by itself
#: in some fifteen steps.
NOISE = (0.1, 0.02)


def make_env(course: Course, scenario: str | None, policy: str, camera: str) -> gymnasium.Env[Any, Any]:
    """The environment as a network likes it: actions and all that is no picture in [-1, 1], and returns noted."""
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
    """Train an agent for so many steps in all, or go on with the one in ``folder``; returns what is known of it.

    Args:
        make: makes the environment of one car.
        folder: for the agent and its log.
        steps: of all cars together, rounded up to whole updates.
        task: the ``seed``, and whatever else an agent that goes on must have been trained on.
        noise: of actions, at the beginning and at the end.
        changes: to `PPO_OPTIONS`, of a new agent.

    Returns:
        ``episodes``, per episode the steps of all cars when it ended, its return, and whether the lane was kept; block
        calls ``reused`` and ``computed`` of denoising passes; ``seconds`` in the model and ``chunks``.

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
        # The log is written first: a run that was killed in between knows of episodes that the agent does not.
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
            if made is not None:  # it is where an episode has just ended
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
        agent.lr_schedule = lambda _, rate=rate: rate
        agent.learn(agent.n_steps * CARS, callback=note, reset_num_timesteps=False)
        write_json(log_file, log)
        with whole(agent_file) as temporary:
            agent.save(temporary)
        print(f"{folder.name}: {agent.num_timesteps} steps, {summary(log)}", flush=True)
    cars.close()
    return log


def summary(log: dict[str, Any]) -> dict[str, float | None]:
    """A log in a few figures; None where nothing happened yet."""
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
    forms = {"return_first": ".2f", "return_last": ".2f", "kept_first": ".0%", "kept_last": ".0%", "skip": ".1%"}
    forms["ms_per_chunk"] = ".0f"
    rows = ""
    for policy, row in figures["policies"].items():
        shown = {name: "–" if row[name] is None else format(row[name], form) for name, form in forms.items()}
        rows += f"| `{policy}` | {row['episodes']} | {' | '.join(shown.values())} |\n"
    return (
        "# PPO inside the world model\n\n"
        f"`python benchmarks/ppo.py`: {figures['steps']} steps of `holdover/Drive-v1` from seed {figures['seed']}, "
        f"{figures['scenario'] or 'all scenarios'}, from the pictures of `{figures['camera']}`, "
        f"the car's own motion and its place in the lane. First and last {OVER} "
        "episodes; an episode keeps the lane if it lasts to its end, 60 steps.\n\n![returns](ppo.png)\n\n"
        "| policy of the world | episodes | return, first | last | kept the lane, first | last | skip | "
        f"ms per chunk |\n| :-- | --: | --: | --: | --: | --: | --: | --: |\n{rows}\n{about(figures['on'])}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; its first camera is what the agent sees")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--runs", type=Path, default=Path("runs/ppo"), help="what was learnt so far")
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", default="highway", help="urban, highway or uturn")
    options = parser.parse_args()
    figures = run(
        options.model or shipped_model(), options.out, options.runs, steps=options.steps, seed=options.seed,
        scenario=options.scenario,
    )  # fmt: skip
    print(card(figures))


if __name__ == "__main__":
    main()

"""Races: references against runs alone, and forks that do not change their loop."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

import holdover
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import HoldWindow, LoopConfig
from holdover_world.loop.scenarios import Scenario, load_scenario
from holdover_world.measure.race import Arm, ArmRun, Race, fork
from holdover_world.model.block import Block
from holdover_world.model.transformer import WorldModel


@pytest.fixture
def scenario(model: WorldModel, clips: Path) -> Scenario:
    return load_scenario("urban", model, clips=clips, chunks=10)


def alone(model: WorldModel, scenario: Scenario, **changes: str) -> Tensor:
    """Full compute without a race."""
    loop = ClosedLoop(model, scenario.start, scenario.start_actions, config=LoopConfig(**changes), seed=0)  # type: ignore[arg-type]
    return torch.cat([piece.latents for piece in loop.run(scenario.actions)], 1)


class Shown:
    """Everything that the runs of a race show."""

    def __init__(self, race: Race) -> None:
        self.race, self.pieces = race, list[dict[str, Tensor]]()

    def step(self, action: Tensor) -> None:
        self.race.step(action)
        runs = dict(self.race.runs)
        runs |= {f"reference of {name}": self.race.reference(name) for name in self.race.arms}
        runs |= {f"base of {name}": self.race.base(name) for name in self.race.arms}
        self.pieces.append({name: run.pieces[-1].latents for name, run in runs.items()})

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat([pieces[name] for pieces in self.pieces], 1)


def test_a_race_gives_what_each_run_gives_alone(model: WorldModel, scenario: Scenario) -> None:
    arms = [
        Arm(name="never", policy=holdover.never()),
        Arm(name="emitted", policy=holdover.never(), loop=LoopConfig(commit="emitted")),
        Arm(name="plain", loop=LoopConfig(cadence="plain")),
    ]
    with Race(model, scenario, arms) as race:
        shown = Shown(race)
        for action in scenario.actions:
            shown.step(action)
    assert torch.equal(shown["never"], alone(model, scenario))
    assert torch.equal(shown["reference of never"], alone(model, scenario))
    assert torch.equal(shown["reference of emitted"], alone(model, scenario, commit="emitted"))
    assert torch.equal(shown["base of plain"], alone(model, scenario, cadence="plain"))
    assert "plain" not in race.runs
    frames = race.runs["emitted"].video()
    decoded = model.codec.decode(shown["emitted"], scenario.start[:, -1])
    assert all((frames[name] == decoded[name][0]).all() for name in decoded)
    assert not any(module.__dict__.get("forward") for module in model.modules())  # the model itself is unchanged


def test_a_reference_commits_what_its_arm_commits(model: WorldModel, scenario: Scenario) -> None:
    """A cache that computes everything commits the last window of a cycle, so its reference must do the same."""
    closed = holdover.xcache_reactive(tau_floor=2.0)
    with Race(model, scenario, [Arm(name="closed", policy=closed, loop=LoopConfig(commit="last_full"))]) as race:
        shown = Shown(race)
        for action in scenario.actions:
            shown.step(action)
        assert all(race.runs["closed"].exact)
    expected = alone(model, scenario, commit="last_full")
    assert torch.equal(shown["reference of closed"], expected)
    assert torch.equal(shown["closed"], expected)
    assert not torch.equal(shown["base of closed"], expected)


def test_a_reference_costs_nothing_until_its_arm_commits_another_window_than_the_first(
    model: WorldModel, clips: Path
) -> None:
    steady = load_scenario("urban-steady", model, clips=clips, chunks=9)
    eager = holdover.xcache_reactive(tau_floor=-1.0, margin=2.0, tau_dev=float("inf"))
    with Race(model, steady, [Arm(name="eager", policy=eager, loop=LoopConfig(commit="last_full"))]) as race:
        for action in steady.actions:
            race.step(action)
        assert race.reference("eager").loop is race.base("eager").loop
        jump = steady.actions[0] + torch.tensor([0.3, 0.0])
        race.step(jump)  # chunk 9, in mid-cycle: the gate has it computed in full
        assert race.reference("eager").loop is not race.base("eager").loop
        assert race.runs["eager"].exact[-1]


def test_last_full_commits_nothing_that_came_from_cache(model: WorldModel, clips: Path) -> None:
    """A full chunk may follow cached ones. Arm and reference still commit the same windows, bit for bit."""
    steady = load_scenario("urban-steady", model, clips=clips, chunks=9)
    eager = holdover.xcache_reactive(tau_floor=-1.0, margin=2.0, tau_dev=float("inf"))
    with Race(model, steady, [Arm(name="eager", policy=eager, loop=LoopConfig(commit="last_full"))]) as race:
        shown, action = Shown(race), steady.actions[0]
        for n in range(12):
            action = action + torch.tensor([0.3, 0.0]) * (n in (6, 11))  # third and fourth of a cycle
            shown.step(action)
        run, reference = race.runs["eager"], race.reference("eager")
        assert run.exact == [n in (0, 4, 6, 8, 11) for n in range(12)]
        own, expected = run.loop.history.state_dict(), reference.loop.history.state_dict()
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    same = [torch.equal(a, b) for a, b in zip(shown["eager"][0], shown["reference of eager"][0], strict=True)]
    assert same == run.exact


def test_a_reference_that_adopts_chunks_equals_full_compute(model: WorldModel, clips: Path) -> None:
    """Against a loop that computes every chunk and is told which ones its leader computed in full."""
    steady = load_scenario("urban-steady", model, clips=clips, chunks=9)
    eager = holdover.xcache_reactive(tau_floor=-1.0, margin=2.0, tau_dev=float("inf"))
    actions = [steady.actions[0] + torch.tensor([0.3, 0.0]) * sum(n >= at for at in (1, 6, 7, 11)) for n in range(12)]
    with Race(model, steady, [Arm(name="eager", policy=eager, loop=LoopConfig(commit="last_full"))]) as race:
        shown, computed = Shown(race), list[int]()
        for n, action in enumerate(actions):
            reference = race.reference("eager")
            with patch.object(ClosedLoop, "step", autospec=True, side_effect=ClosedLoop.step) as step:
                shown.step(action)
            ran = [call.args[0] for call in step.call_args_list]
            if reference.loop is not race.base("eager").loop and any(loop is reference.loop for loop in ran):
                computed.append(n)
        exact, frames = race.runs["eager"].exact, race.reference("eager").video()

    class Told:
        chunk = -1

        def step(self, **_: object) -> nullcontext[None]:
            return nullcontext()

        def exact(self, _: str) -> bool:
            return exact[loop.chunk]

    config = LoopConfig(commit="last_full")
    loop = ClosedLoop(
        model, steady.start, steady.start_actions, config=config, cache=cast(Any, Told()), track=steady.track
    )
    pieces = list(loop.run(torch.stack(actions)))
    assert torch.equal(shown["reference of eager"], torch.cat([piece.latents for piece in pieces], 1))
    decoded = [model.codec.decode(piece.latents, piece.before) for piece in pieces]
    assert all((np.concatenate([each[name][0] for each in decoded]) == video).all() for name, video in frames.items())
    assert exact == [n in (0, 1, 4, 6, 7, 8, 11) for n in range(12)]
    assert computed == [1, 2, 3, 5, 9, 10]  # it splits at 1, and then computes those that its leader took from cache


def told(race: Race, chunks: int) -> dict[str, list[Tensor]]:
    """What the frames of each run's windows are told, chunk by chunk; nothing where no pass ran."""
    heard: dict[str, list[Tensor]] = {}

    def listen(name: str, run: ArmRun) -> None:
        own = heard[name] = []

        def note(_model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            if kwargs["sigma"] == 1:
                own.append(kwargs["action_BFA"][0])

        run.loop.model.register_forward_pre_hook(note, with_kwargs=True)

    for name, run in race.runs.items():
        listen(name, run)
    listen("base of held", race.base("held"))
    for action in race.scenario.actions[:chunks]:
        race.step(action)
    return heard


def test_an_oracle_plan_is_what_the_scenario_commands_next_and_references_are_told_the_same(
    model: WorldModel, scenario: Scenario
) -> None:
    actions = scenario.actions
    arms = [
        Arm(name="newest", policy=holdover.never()),
        Arm(name="oracle", policy=holdover.never(), plan="oracle"),
        Arm(name="held", policy=holdover.never(), plan="oracle", loop=LoopConfig(hold_window=HoldWindow())),
    ]
    with Race(model, scenario, arms) as race:
        assert race.base("oracle") is race.base("held") is not race.base("newest")
        heard = told(race, 6)
        held = {name: run.held for name, run in race.runs.items()}
        windows = {name: torch.cat([piece.latents for piece in run.pieces], 1) for name, run in race.runs.items()}
        expected = torch.cat([piece.latents for piece in race.base("held").pieces], 1)
    oracle = [actions[:4]] * 4 + [actions[4:8]] * 2
    newest = [torch.stack([*actions[n - n % 4 : n], *[actions[n]] * (4 - n % 4)]) for n in range(6)]
    for name, expected_told in {"newest": newest, "oracle": oracle, "held": [oracle[0], oracle[4]]}.items():
        assert all(map(torch.equal, heard[name], expected_told))
        assert len(heard[name]) == len(expected_told)
    assert all(map(torch.equal, heard["base of held"], oracle))
    assert len(heard["base of held"]) == 6
    assert held == {"newest": [False] * 6, "oracle": [False] * 6, "held": [n % 4 > 0 for n in range(6)]}
    assert torch.equal(windows["oracle"], expected)
    torch.testing.assert_close(windows["held"], expected, atol=0.5, rtol=0)
    with pytest.raises(ValueError, match="plan='prophecy' is not one of newest, oracle"):
        Arm(name="x", plan="prophecy")  # type: ignore[arg-type]


def test_a_held_window_is_no_chunk_that_was_computed_in_full(model: WorldModel, clips: Path) -> None:
    """So a reference that follows its arm's commits splits off where that commits another window, and not before."""
    steady = load_scenario("urban-steady", model, clips=clips, chunks=9)
    eager = holdover.xcache_reactive(tau_floor=-1.0, margin=2.0, tau_dev=float("inf"))
    loop = LoopConfig(commit="last_full", hold_window=HoldWindow())
    with Race(model, steady, [Arm(name="eager", policy=eager, loop=loop)]) as race:
        for _ in range(5):
            race.step(steady.actions[0])
        run = race.runs["eager"]
        assert (run.held, run.exact) == ([n % 4 > 0 for n in range(5)], [True] * 5)
        assert race.reference("eager").loop is race.base("eager").loop
        for _ in range(2):
            race.step(steady.actions[0] + torch.tensor([0.3, 0.0]))
        assert run.held[5:] == [False, True]
        assert race.reference("eager").loop is not race.base("eager").loop
        race.step(steady.actions[0] + torch.tensor([0.3, 0.0]))
        own, expected = run.loop.history.state_dict(), race.reference("eager").loop.history.state_dict()
    assert all(torch.equal(own[name], expected[name]) for name in expected)


def test_a_fork_is_independent(model: WorldModel, scenario: Scenario) -> None:
    run = ArmRun.start(Arm(name="x", policy=holdover.xcache()), model, scenario, seed=0)
    for action in scenario.actions[:5]:
        run.step(action)
    twin = fork(run.loop, "twin")
    forked = [twin.step(action).latents for action in scenario.actions[5:]]
    own = [run.step(action).latents for action in scenario.actions[5:]]
    assert torch.equal(torch.cat(forked, 1), torch.cat(own, 1))
    assert len(run.commit_errors()) == 2  # the fork's KV updates are not the run's
    stats = run.stats()
    assert stats is not None
    assert len(run.decisions()) == stats.computed + stats.reused
    run.close()


def test_commit_errors_compare_committed_with_shown_frames(model: WorldModel, scenario: Scenario) -> None:
    arms = [
        Arm(name="first", policy=holdover.never()),
        Arm(name="emitted", policy=holdover.never(), loop=LoopConfig(commit="emitted")),
    ]
    with Race(model, scenario, arms) as race:
        for action in scenario.actions[:8]:
            race.step(action)
    assert race.runs["emitted"].commit_errors() == [0.0, 0.0]
    assert len(race.runs["first"].commit_errors()) == 2
    assert min(race.runs["first"].commit_errors()) > 0


def test_full_compute_knows_what_its_blocks_and_passes_took(
    model: WorldModel, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that sleep take what they sleep; forks on the same model, KV updates and cached runs do not count."""
    nap, own = 0.002, Block.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(nap)
        return own(*args, **kwargs)

    monkeypatch.setattr(Block, "forward", slow)
    with Race(model, scenario, [Arm(name="x", policy=holdover.xcache(), plan="oracle")]) as race:
        base = race.base("x")
        for action in scenario.actions[:8]:
            fork(base.loop, "other").step(action)
            race.step(action)
        blocks, passes, dit = (np.array(v) for v in (base.block_seconds, base.pass_seconds, base.dit_seconds))
        shares = base.shares(range(4, 8))
        with pytest.raises(ValueError, match=r"'x' is no run of full compute"):
            race.runs["x"].shares(range(4, 8))
    least = 4 * model.sizes.layers * nap
    assert len(blocks) == len(passes) == 8
    assert (least <= blocks).all()
    assert (blocks <= passes).all()
    assert (passes <= dit).all()
    assert (passes[3::4] <= dit[3::4] - model.sizes.layers * nap).all()  # the KV update
    assert shares.blocks == pytest.approx(blocks[4:].sum() / dit[4:].sum())
    assert shares.passes == pytest.approx(passes[4:].sum() / dit[4:].sum())
    assert not race.base("x").loop.model.blocks[0]._forward_hooks


def test_arms_need_names_of_their_own(model: WorldModel, scenario: Scenario) -> None:
    with pytest.raises(ValueError, match="two arms are called 'x'"):
        Race(model, scenario, [Arm(name="x"), Arm(name="x")])

"""Reactions of loops with a known response, and of a real cache that cannot react."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import holdover
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import Commit, HoldWindow, LoopConfig
from holdover_world.loop.scenarios import load_scenario
from holdover_world.measure.race import Arm, Race
from holdover_world.measure.reaction import (
    EVENTS,
    Reaction,
    can_react,
    mean_ratio,
    measure,
    moments,
    response_ratio,
    run_race,
)
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.vehicles import denormalise_action, normalise_action

DRIVING = torch.from_numpy(normalise_action(10.0, 0.0))


def _pictures(_modality: str, latents: Tensor, _before: Tensor | None) -> dict[str, Tensor]:
    return {"front": latents}


@dataclass
class FakeLoop:
    """Shows ``gain`` times the action of ``delay`` chunks ago; its latents are its pictures."""

    gain: float
    delay: int = 0
    chunk: int = 5
    window_frames: int = 4
    model: Any = field(default_factory=lambda: SimpleNamespace(codec=SimpleNamespace(pictures=_pictures)))
    cache: Any = None
    stream: str = "default"

    def __post_init__(self) -> None:
        self.actions, self.plans = [DRIVING], list[Tensor | None]()

    def fork(self, stream: str) -> FakeLoop:
        return replace(self, stream=stream)

    def step(self, action: Tensor, plan: Tensor | None = None) -> SimpleNamespace:
        self.actions.append(action)
        self.plans.append(plan)
        self.chunk += 1
        shown = self.actions[max(0, len(self.actions) - 1 - self.delay)]
        return SimpleNamespace(latents=0.5 * self.gain * shown.repeat(3), before=None)


def fake(gain: float, delay: int = 0) -> ClosedLoop:
    return cast(ClosedLoop, FakeLoop(gain, delay))


@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0, 1.25])
def test_a_known_response_gives_its_ratio(gain: float) -> None:
    for reaction in measure(fake(gain), fake(1.0), DRIVING):
        assert reaction.ratios == (pytest.approx(gain),)
        assert reaction.position == 1
        assert reaction.late == (0 if gain >= 0.9 else None)


def test_the_delay_of_a_response_is_measured() -> None:
    for reaction in measure(fake(1.0, delay=2), fake(1.0), DRIVING, horizon=4):
        if reaction.event == "lane_change":  # its actions change, and the delay shows only under a constant one
            continue
        assert reaction.ratios == (0.0, 0.0, pytest.approx(1.0), pytest.approx(1.0))
        assert reaction.late == 2


def test_measuring_advances_neither_loop() -> None:
    cached, full = fake(0.5), fake(1.0)
    measure(cached, full, DRIVING, horizon=3)
    assert cached.chunk == full.chunk == 5
    assert len(cast(FakeLoop, cached).actions) == 1


def test_an_event_revises_the_plan() -> None:
    """Without an event the loop is told what follows; with it, what the event commands next."""
    told: dict[str, list[tuple[Tensor, Tensor | None]]] = {}

    @dataclass
    class Telling(FakeLoop):
        def step(self, action: Tensor, plan: Tensor | None = None) -> SimpleNamespace:
            told.setdefault(self.stream, []).append((action, plan))
            return super().step(action, plan)

        def fork(self, stream: str) -> FakeLoop:
            return replace(self, stream=stream)

    plan = torch.stack([DRIVING + 0.1, DRIVING + 0.2, DRIVING + 0.3])
    measure(fake(1.0), cast(ClosedLoop, Telling(1.0)), DRIVING, plan=plan, horizon=3)
    (a, first), (b, second), (c, third) = told["reaction calm"]
    assert torch.equal(torch.stack([a, b, c]), torch.stack([DRIVING, *plan[:2]]))
    for rest, expected in ((first, plan), (second, plan[1:]), (third, plan[2:])):
        assert rest is not None
        assert torch.equal(rest[: len(expected)], expected)
        assert (rest[len(expected) :] == plan[-1]).all()
    commands = torch.stack(list(EVENTS[2].actions(DRIVING)))
    (a, first), (b, second), (c, third) = told["reaction lane_change"]
    assert torch.equal(torch.stack([a, b, c]), commands)
    assert first is not None
    assert torch.equal(first[:2], commands[1:])
    told.clear()
    measure(fake(1.0), cast(ClosedLoop, Telling(1.0)), DRIVING, horizon=2)
    assert all(plan is None for steps in told.values() for _, plan in steps)
    assert all(torch.equal(action, DRIVING) for action, _ in told["reaction calm"])


def test_loops_at_different_chunks_are_refused() -> None:
    ahead = fake(1.0)
    ahead.chunk += 1
    with pytest.raises(ValueError, match="chunk"):
        measure(fake(1.0), ahead, DRIVING)


def test_response_ratio_is_a_projection() -> None:
    full = torch.tensor([3.0, 4.0])
    assert response_ratio(torch.tensor([4.0, -3.0]), full) == 0
    assert response_ratio(2 * full + torch.tensor([4.0, -3.0]), full) == pytest.approx(2)
    assert response_ratio(full, torch.zeros(2)) is None


def test_events_have_their_speeds_and_accelerations() -> None:
    actions = {event.name: [denormalise_action(a.numpy()) for a in event.actions(DRIVING)] for event in EVENTS}
    ((speed, curvature),) = actions["brake"]
    assert (speed, curvature) == (pytest.approx(2.0), pytest.approx(0.0))
    ((speed, curvature),) = actions["steer"]
    assert speed == pytest.approx(10.0)
    assert speed**2 * curvature == pytest.approx(4.0, rel=1e-4)  # m/s^2
    left, right, straight = (float(curvature) for _, curvature in actions["lane_change"])
    assert (left, right, straight) == (pytest.approx(0.025, rel=1e-4), pytest.approx(-0.025, rel=1e-4), 0.0)


def test_a_car_at_full_lock_is_steered_the_other_way() -> None:
    turning = torch.from_numpy(normalise_action(4.0, 0.2))
    _, curvature = denormalise_action(next(e for e in EVENTS if e.name == "steer").actions(turning)[0].numpy())
    assert float(curvature) == pytest.approx(0.1, rel=1e-4)


def test_moments_are_in_mid_cycle_and_in_motion() -> None:
    actions = DRIVING.expand(40, -1).clone()
    chosen = moments(actions, 4, 2)
    assert [g % 4 for g in chosen] == [1, 2]
    assert min(chosen) >= 4
    actions[:20, 0] = 0.0  # standing
    assert not can_react(actions[0])
    assert min(moments(actions, 4, 3)) >= 20
    assert moments(actions[:20], 4, 2) == []


def test_moments_are_where_the_action_is_constant() -> None:
    actions = DRIVING.expand(40, -1).clone()
    actions[:, 0] += torch.linspace(0, 0.8, 40)  # speeding up all the time: 0.02 a chunk
    actions[24:32, 0] = actions[24, 0]
    assert moments(actions, 4, 2) == [25, 30]
    assert [g for g in moments(actions, 4, 6) if not 24 <= g < 32] == [5, 9]  # the least change, if none is constant


def test_means_leave_out_missing_ratios() -> None:
    def brake(*ratios: float | None) -> Reaction:
        return Reaction(event="brake", position=1, ratios=ratios, response=1.0, error=0.0)

    assert mean_ratio([brake(0.5), brake(None), brake(1.0)], "brake") == 0.75
    assert mean_ratio([brake(None)], "brake") is None


@pytest.mark.parametrize("commit", ["first", "last_full", "emitted"])
def test_a_cache_that_computes_everything_reacts_as_full_compute_does(
    model: WorldModel, clips: Any, commit: Commit
) -> None:
    """Also after the end of the cycle, where the committed window begins to matter."""
    scenario = load_scenario("urban-steady", model, clips=clips, chunks=8)
    arms = [
        Arm(name="closed", policy=holdover.xcache_reactive(tau_floor=2.0), loop=LoopConfig(commit=commit)),
        Arm(name="other", policy=holdover.never()),  # with a commit rule and a reference of its own
    ]
    with Race(model, scenario, arms) as race:
        found = run_race(race, scenario.actions, at=[6], horizon=4, advance=lambda: None)
    for reaction in found["closed"] + found["other"]:
        # None: a lane change that is over, under a rule that committed an earlier window
        assert all(ratio is None or ratio == pytest.approx(1.0) for ratio in reaction.ratios)
        assert reaction.error == 0


def test_a_loop_that_holds_its_window_reacts_at_once(model: WorldModel, clips: Any) -> None:
    """What is held was drawn with another action, so it is not shown."""
    scenario = load_scenario("urban", model, clips=clips, chunks=8)
    arm = Arm(name="held", policy=holdover.never(), plan="oracle", loop=LoopConfig(hold_window=HoldWindow()))
    with Race(model, scenario, [arm]) as race:
        found = run_race(race, scenario.actions, at=[5, 6], horizon=2, advance=lambda: None)["held"]
        assert race.runs["held"].held == [n % 4 > 0 for n in range(8)]
    assert len(found) == 6
    for reaction in found:
        assert reaction.ratios[0] == pytest.approx(1.0, abs=0.1)
        assert reaction.late == 0


def test_a_cache_that_reuses_whatever_happens_does_not_react(model: WorldModel, clips: Any) -> None:
    """If every block is reused, no action reaches the tokens. The reactive cache shows all of it."""
    model = copy.deepcopy(model)
    torch.nn.init.zeros_(model.final_modulation.weight)  # the paths of an action around the blocks: this,
    for part in (model.keep, *model.last_embed, model.seen_embed):  # and the expectation
        torch.nn.init.zeros_(part.weight)
    torch.nn.init.constant_(model.keep.bias, -200.0)
    scenario = load_scenario("urban-steady", model, clips=clips, chunks=8)
    deaf = holdover.xcache(front_anchors=0, tau_floor=-1.0, margin=2.0, tau_dev=float("inf"))
    arms = [Arm(name="deaf", policy=deaf), Arm(name="reactive", policy=holdover.xcache_reactive())]
    with Race(model, scenario, arms) as race:
        measured = run_race(race, scenario.actions, at=[5], horizon=2, advance=lambda: None)
        assert race.runs["deaf"].loop.chunk == 8
        streams = {d.stream for d in race.runs["deaf"].loop.cache.trace}  # type: ignore[union-attr]
    assert "reaction brake" in streams  # the events ran in streams of their own
    assert mean_ratio(measured["deaf"], "brake") == 0
    assert mean_ratio(measured["reactive"], "brake") == pytest.approx(1.0, abs=0.02)
    assert mean_ratio(measured["reactive"], "steer") == pytest.approx(1.0, abs=0.02)

"""How a cached run reacts to an abrupt action in mid-cycle, compared with full compute.

The *response* is the change of the pictures: with the event minus without it. The *response ratio* is the projection of
the cached response onto that of full compute, ``<cached, full> / |full|^2``. It is 1 for the same response and 0 if the
car ignores the action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from holdover.engine.cache import Cache
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import Commit
from holdover_world.loop.state import Piece
from holdover_world.measure.race import Race, fork
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.vehicles import denormalise_action, normalise_action

#: The response ratio from which a run counts as having reacted.
REACTED = 0.9
#: Reactions are not measured below this commanded speed (m/s): braking and steering would change little.
MIN_SPEED = 2.0
_STEER = 4.0  # m/s^2, lateral acceleration of an evasive turn
_LANE_CHANGE = 2.5  # m/s^2, of a brisk lane change
_SHARPEST = 0.1  # 1/m
_STILL = 0.01  # of an action's range: changes up to this are the script's small corrections


@dataclass(frozen=True, kw_only=True)
class Event:
    """An abrupt command. Maps the current action ``[A]`` to the actions of the chunks from the event on."""

    name: str
    actions: Callable[[Tensor], Sequence[Tensor]]


def _brake(action: Tensor) -> Sequence[Tensor]:
    return (action * torch.tensor([0.2, 1.0]),)


def _steer(action: Tensor) -> Sequence[Tensor]:
    return (_turned(action, _STEER),)


def _change_lane(action: Tensor) -> Sequence[Tensor]:
    return _turned(action, _LANE_CHANGE), _turned(action, -_LANE_CHANGE), action


#: The last action of an event continues. Braking is to a fifth of the speed.
EVENTS = (
    Event(name="brake", actions=_brake),
    Event(name="steer", actions=_steer),
    Event(name="lane_change", actions=_change_lane),
)


@dataclass(frozen=True, kw_only=True)
class Reaction:
    """The reaction to one event.

    Attributes:
        event: the name of the event.
        position: its position in the cycle.
        ratios: the response ratio of each chunk from that of the event on. None if full compute does not respond.
        response: root mean square of the full-compute response in the event's chunk, in units of 1/255.
        error: mean squared error of the cached pictures in that chunk, in units of 1/255.
    """

    event: str
    position: int
    ratios: tuple[float | None, ...]
    response: float
    error: float

    @property
    def late(self) -> int | None:
        """Chunks until the ratio reaches `REACTED`: 0 in the event's chunk, None if it never does."""
        return next((i for i, ratio in enumerate(self.ratios) if ratio is not None and ratio >= REACTED), None)


@dataclass(frozen=True, kw_only=True)
class Response:
    """One chunk under an event: its pictures in [-1, 1] as one vector, and their change against no event."""

    pictures: Tensor
    change: Tensor


Responses = dict[str, list[Response]]  # for each event the chunks from it on


def response_ratio(cached: Tensor, full: Tensor) -> float | None:
    """The projection of the cached response onto the full one; None if the full one is zero."""
    norm = float(full.double().square().sum())
    return float((cached.double() * full.double()).sum()) / norm if norm > 0 else None


def can_react(action: Tensor) -> bool:
    """Whether the car moves fast enough under ``action [A]`` for braking and steering to show."""
    return float(denormalise_action(action.numpy())[0]) >= MIN_SPEED


def measure(
    cached: ClosedLoop[WorldModel],
    full: ClosedLoop[WorldModel],
    action: Tensor,
    *,
    plan: Tensor | None = None,
    events: Sequence[Event] = EVENTS,
    horizon: int = 1,
    full_responses: Responses | None = None,
) -> list[Reaction]:
    """Measure the reactions of a cached loop from its current state. Neither loop is advanced.

    Args:
        cached: a running loop with a cache, in mid-cycle.
        full: its full-compute reference, at the same chunk.
        action: the action ``[A]`` without an event.
        plan: what follows it without an event, ``[T, A]``, for loops that are told so. The event revises it: from then
            on the driver intends what the event commands next. None: the action is held, and loops are told no plan.
        horizon: the number of chunks to look at, the event's chunk included.
        full_responses: the reference's responses. They are computed if it is empty, so that several cached loops with
            one reference can share it.

    Raises:
        ValueError: the loops are at different chunks.
    """
    if cached.chunk != full.chunk:
        raise ValueError(f"the cached loop is at chunk {cached.chunk}, the full one at {full.chunk}")
    memory = full_responses if full_responses is not None else {}
    if not memory:
        memory.update(_respond(full, action, plan, events, horizon))
    position = cached.chunk % cached.window_frames
    return [
        Reaction(
            event=name,
            position=position,
            ratios=tuple(response_ratio(c.change, f.change) for c, f in zip(responses, memory[name], strict=True)),
            response=_mean_square(memory[name][0].change) ** 0.5,
            error=_mean_square(responses[0].pictures - memory[name][0].pictures),
        )
        for name, responses in _respond(cached, action, plan, events, horizon).items()
    ]


def measure_race(
    race: Race, action: Tensor, *, events: Sequence[Event] = EVENTS, horizon: int = 1
) -> dict[str, list[Reaction]]:
    """`measure` for every cached run of a race, from its current state and with its plan. The race is not advanced."""
    responses: dict[tuple[int, Commit], Responses] = {}
    reactions = {}
    for name, run in race.runs.items():
        # With the arm's commit rule, but not following its commits: the event is not part of the arm's run.
        full, commit = fork(race.reference(name).loop, "reference"), run.loop.config.commit
        full.cache, full.config = None, replace(full.config, commit=commit)
        memory = responses.setdefault((id(race.reference(name).loop), commit), {})
        loops = run.loop, full
        reactions[name] = measure(*loops, action, plan=run.plan, events=events, horizon=horizon, full_responses=memory)
    return reactions


def run_race(
    race: Race,
    actions: Tensor,
    *,
    at: Sequence[int] = (),
    events: Sequence[Event] = EVENTS,
    horizon: int = 1,
    advance: Callable[[], None],
) -> dict[str, list[Reaction]]:
    """Run a race to the end and measure reactions on the way.

    Args:
        actions: one action for each chunk, ``[G, A]``.
        at: the chunks at which to measure, see `moments`.
        events, horizon: see `measure`.
        advance: called after each chunk.

    Returns:
        The reactions of each cached run.
    """
    reactions: dict[str, list[Reaction]] = {name: [] for name in race.runs}
    for g, action in enumerate(actions):
        if g in at:
            for name, found in measure_race(race, action, events=events, horizon=horizon).items():
                reactions[name] += found
        race.step(action)
        advance()
    return reactions


def moments(actions: Tensor, cycle: int, count: int) -> list[int]:
    """At most ``count`` chunks at which to measure, spread over a run.

    The car moves there. They are in mid-cycle, after the first cycle. The last chunk of a cycle is left out: there even
    a cache that never reacts is only one chunk late. The action has been constant since the start of the cycle, or has
    changed least: while the script changes the action, the change of the picture is not due to the event.
    """
    inside = range(1, max(2, cycle - 1))
    unrest = {
        g: float((actions[g - g % cycle : g + 1] - actions[g]).abs().max())
        for g in range(cycle, len(actions))
        if g % cycle in inside and can_react(actions[g])
    }
    quiet = sorted(unrest, key=lambda g: (max(unrest[g], _STILL), g))
    calm = [g for g in quiet if unrest[g] <= _STILL] if count else []
    if len(calm) <= count:
        return sorted(quiet[:count])
    chosen: list[int] = []
    for i in range(count):
        target, position = cycle + (i + 0.5) / count * (len(actions) - cycle), inside[i % len(inside)]
        free = [g for g in calm if g not in chosen]
        chosen.append(min(free, key=lambda g: abs(g - target) + (cycle if g % cycle != position else 0)))
    return sorted(chosen)


def mean_ratio(reactions: Sequence[Reaction], event: str) -> float | None:
    """The mean response ratio in the event's chunk; None if it was never measured."""
    ratios = [r.ratios[0] for r in reactions if r.event == event and r.ratios[0] is not None]
    return fmean(ratios) if ratios else None


def _respond(
    loop: ClosedLoop[WorldModel], action: Tensor, plan: Tensor | None, events: Sequence[Event], horizon: int
) -> Responses:
    planned = plan is not None
    calm = _run(loop, "calm", [action, *([] if plan is None else plan)], horizon, planned)
    responses = {}
    for event in events:
        eventful = _run(loop, event.name, event.actions(action), horizon, planned)
        responses[event.name] = [Response(pictures=e, change=e - c) for e, c in zip(eventful, calm, strict=True)]
    return responses


def _mean_square(difference: Tensor) -> float:
    """The mean square of a difference of pictures in [-1, 1], in units of 1/255."""
    return float((difference.double() * 127.5).square().mean())


def _run(
    loop: ClosedLoop[WorldModel], name: str, actions: Sequence[Tensor], horizon: int, planned: bool
) -> list[Tensor]:
    """The pictures of a fork under these commands, of which the last continues; each plan is what follows."""
    stream = f"reaction {name}"
    twin, commands = fork(loop, stream), torch.stack([*actions, *[actions[-1]] * horizon])
    shown = [_pictures(loop, twin.step(commands[n], commands[n + 1 :] if planned else None)) for n in range(horizon)]
    if isinstance(loop.cache, Cache):
        loop.cache.reset(stream)
    return shown


def _pictures(loop: ClosedLoop[WorldModel], piece: Piece) -> Tensor:
    """The pictures of a piece in [-1, 1], all cameras as one vector."""
    cameras = loop.model.codec.pictures("colour", piece.latents, piece.before)
    return torch.cat([video.flatten() for video in cameras.values()]).clamp(-1, 1)


def _turned(action: Tensor, lateral_acceleration: float) -> Tensor:
    """The same speed with a curvature changed by a lateral acceleration in m/s^2, positive to the left."""
    speed, curvature = denormalise_action(action.numpy())
    if curvature > 0:  # a car that already turns left is turned right: at full lock only that shows
        lateral_acceleration = -lateral_acceleration
    change = max(-_SHARPEST, min(_SHARPEST, lateral_acceleration / max(float(speed), MIN_SPEED) ** 2))
    return torch.from_numpy(normalise_action(speed, curvature + change))

"""Does a cached rollout still obey? An abrupt action in the middle of a cycle, with and without, cached and in full.

The *response* is what the action changes: pictures under the event minus pictures without it. The
*response ratio* is the projection of the cached response onto the full one, ``<cached, full> / |full|^2``: 1 is right,
0 is a car that drives on as if nothing had been said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from holdover_world.loop.closed_loop import ClosedLoop, Commit, Piece
from holdover_world.measure.race import Race, fork
from holdover_world.scene.vehicles import denormalise_action, normalise_action

#: A response ratio from which the rollout counts as having reacted.
REACTED = 0.9
#: Below this commanded speed (m/s) there is nothing to brake and steering moves nothing.
MIN_SPEED = 2.0
_STEER = 4.0  # m/s^2, lateral acceleration of an evasive turn
_LANE_CHANGE = 2.5  # m/s^2, of a brisk lane change
_SHARPEST = 0.1  # 1/m
_STILL = 0.01  # of an action's range; the script's own small corrections


@dataclass(frozen=True, kw_only=True)
class Event:
    """What is commanded from its chunk on: maps the present action ``[A]`` to one action per chunk."""

    name: str
    actions: Callable[[Tensor], Sequence[Tensor]]


def _brake(action: Tensor) -> Sequence[Tensor]:
    return (action * torch.tensor([0.2, 1.0]),)


def _steer(action: Tensor) -> Sequence[Tensor]:
    return (_turned(action, _STEER),)


def _change_lane(action: Tensor) -> Sequence[Tensor]:
    return _turned(action, _LANE_CHANGE), _turned(action, -_LANE_CHANGE), action


#: Each holds its last action. Braking is to a fifth of the speed.
EVENTS = (
    Event(name="brake", actions=_brake),
    Event(name="steer", actions=_steer),
    Event(name="lane_change", actions=_change_lane),
)


@dataclass(frozen=True, kw_only=True)
class Reaction:
    """One event, once.

    Attributes:
        event: its name.
        position: where in the cycle it fell.
        ratios: the response ratio of each chunk from the event's own on; None where the full-compute rollout
            does not respond either.
        response: root mean square of the full response in the event's own chunk, in units of 1/255.
        error: mean squared error of the cached picture there, in units of 1/255: what PSNR sees of it.
    """

    event: str
    position: int
    ratios: tuple[float | None, ...]
    response: float
    error: float

    @property
    def late(self) -> int | None:
        """Chunks until the ratio first reaches `REACTED`, 0 in the event's own; None if it never did."""
        return next((i for i, ratio in enumerate(self.ratios) if ratio is not None and ratio >= REACTED), None)


@dataclass(frozen=True, kw_only=True)
class Response:
    """One chunk under an event: its pictures in [-1, 1], all in one row, and how they differ from calm."""

    pictures: Tensor
    change: Tensor


Responses = dict[str, list[Response]]  # per event, for each chunk from it on


def response_ratio(cached: Tensor, full: Tensor) -> float | None:
    """The projection of one response onto another, None where the other is zero."""
    norm = float(full.double().square().sum())
    return float((cached.double() * full.double()).sum()) / norm if norm > 0 else None


def can_react(action: Tensor) -> bool:
    """Whether the car moves enough under ``action [A]`` for braking and steering to show."""
    return float(denormalise_action(action.numpy())[0]) >= MIN_SPEED


def measure(
    cached: ClosedLoop,
    full: ClosedLoop,
    action: Tensor,
    *,
    events: Sequence[Event] = EVENTS,
    horizon: int = 1,
    full_responses: Responses | None = None,
) -> list[Reaction]:
    """Measure the reaction of a cached rollout from where it stands; neither loop is moved.

    Args:
        cached: a running loop with a cache, in the middle of a cycle.
        full: its full-compute reference, at the same chunk.
        action: what is commanded without an event, ``[A]``.
        horizon: chunks to look at, the event's own included.
        full_responses: filled with the reference's responses, or read where it holds them: several cached loops
            with the same reference need them once.

    Raises:
        ValueError: the loops stand at different chunks.
    """
    if cached.chunk != full.chunk:
        raise ValueError(f"the cached loop is at chunk {cached.chunk}, the full one at {full.chunk}")
    memory = full_responses if full_responses is not None else {}
    if not memory:
        memory.update(_respond(full, action, events, horizon))
    position = cached.chunk % cached.window_frames
    return [
        Reaction(
            event=name,
            position=position,
            ratios=tuple(response_ratio(c.change, f.change) for c, f in zip(responses, memory[name], strict=True)),
            response=_mean_square(memory[name][0].change) ** 0.5,
            error=_mean_square(responses[0].pictures - memory[name][0].pictures),
        )
        for name, responses in _respond(cached, action, events, horizon).items()
    ]


def measure_race(
    race: Race, action: Tensor, *, events: Sequence[Event] = EVENTS, horizon: int = 1
) -> dict[str, list[Reaction]]:
    """`measure` for every cached run of a race, where it stands; the race is not moved."""
    responses: dict[tuple[int, Commit], Responses] = {}
    reactions = {}
    for name, lane in race.lanes.items():
        # By the arm's own rule, but not after its commits: those are decisions of a run that is not under way.
        full, commit = fork(race.reference(name).loop, "reference"), lane.loop.config.commit
        full.cache, full.config = None, replace(full.config, commit=commit)
        memory = responses.setdefault((id(race.reference(name).loop), commit), {})
        reactions[name] = measure(lane.loop, full, action, events=events, horizon=horizon, full_responses=memory)
    return reactions


def drive(
    race: Race,
    actions: Tensor,
    *,
    at: Sequence[int] = (),
    events: Sequence[Event] = EVENTS,
    horizon: int = 1,
    advance: Callable[[], None],
) -> dict[str, list[Reaction]]:
    """Run a race to the end, measuring reactions on the way.

    Args:
        actions: one per chunk ``[G, A]``.
        at: chunks at which to measure, see `moments`.
        events, horizon: see `measure`.
        advance: called after each chunk.

    Returns:
        The reactions of each cached run.
    """
    reactions: dict[str, list[Reaction]] = {name: [] for name in race.lanes}
    for g, action in enumerate(actions):
        if g in at:
            for name, found in measure_race(race, action, events=events, horizon=horizon).items():
                reactions[name] += found
        race.step(action)
        advance()
    return reactions


def moments(actions: Tensor, cycle: int, count: int) -> list[int]:
    """Chunks at which to measure, at most ``count``, spread over a rollout.

    They lie in mid-cycle, after the first cycle and before a cycle's last chunk, where even a cache that never
    reacts is only one chunk late; the car moves there. The action has held still since the cycle's start, or
    changed less than elsewhere: while the script itself is changing it, an event is not what changes the picture.
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
    """The mean response ratio in the event's own chunk; None where it could not be measured."""
    ratios = [r.ratios[0] for r in reactions if r.event == event and r.ratios[0] is not None]
    return fmean(ratios) if ratios else None


def mean_late(reactions: Sequence[Reaction], event: str) -> float | None:
    """The mean number of chunks until the rollout reacted; None if in some case it did not within the horizon."""
    late = [r.late for r in reactions if r.event == event]
    return None if not late or None in late else fmean(n for n in late if n is not None)


def _respond(loop: ClosedLoop, action: Tensor, events: Sequence[Event], horizon: int) -> Responses:
    calm = _run(loop, "calm", [action] * horizon)
    responses = {}
    for event in events:
        commands = list(event.actions(action))
        commands += [commands[-1]] * (horizon - len(commands))
        eventful = _run(loop, event.name, commands[:horizon])
        responses[event.name] = [Response(pictures=e, change=e - c) for e, c in zip(eventful, calm, strict=True)]
    return responses


def _mean_square(difference: Tensor) -> float:
    """Of pictures in [-1, 1], in units of 1/255 of a pixel's range."""
    return float((difference.double() * 127.5).square().mean())


def _run(loop: ClosedLoop, name: str, actions: Sequence[Tensor]) -> list[Tensor]:
    stream = f"reaction {name}"
    twin = fork(loop, stream)
    shown = [_pictures(loop, twin.step(action)) for action in actions]
    if loop.cache is not None:
        loop.cache.reset(stream)
    return shown


def _pictures(loop: ClosedLoop, piece: Piece) -> Tensor:
    """What a piece shows, in [-1, 1], all cameras in one row."""
    cameras = loop.model.codec.pictures("colour", piece.latents, piece.before)
    return torch.cat([video.flatten() for video in cameras.values()]).clamp(-1, 1)


def _turned(action: Tensor, lateral_acceleration: float) -> Tensor:
    """The same speed, turned out of its present course at a lateral acceleration in m/s^2, positive to the left."""
    speed, curvature = denormalise_action(action.numpy())
    if curvature > 0:  # a car that turns left already is turned the other way: at full lock no other way shows
        lateral_acceleration = -lateral_acceleration
    change = max(-_SHARPEST, min(_SHARPEST, lateral_acceleration / max(float(speed), MIN_SPEED) ** 2))
    return torch.from_numpy(normalise_action(speed, curvature + change))

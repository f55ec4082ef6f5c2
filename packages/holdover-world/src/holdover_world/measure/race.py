"""Runs to be compared, interleaved chunk by chunk in one process.

Every run has its own copy of the model, so each policy has its own cache. The reference of a cached run computes
everything, with the same cadence, seed, actions and plans, *and commits the same windows*. A commit rule that depends
on the cache (``last_full``) therefore holds for the reference as well: another history would give another video.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdover.decision import Decision, Stats
from holdover.engine.attach import attach
from holdover.engine.cache import Cache
from holdover.method import Policy
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import Commit, LoopConfig
from holdover_world.loop.scenarios import Scenario
from holdover_world.loop.state import Piece
from holdover_world.measure.timing import BlockClock, Shares, clock_blocks
from holdover_world.model.transformer import WorldModel

STREAM = "default"
PlanKind = Literal["newest", "oracle"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run a scenario: a policy, a cadence and a plan.

    Attributes:
        name: of the arm.
        policy: or policies, outermost first. None is full compute, with nothing attached.
        loop: the cadence.
        plan: what frames are told that are not yet commanded: the ``newest`` action, or what the scenario commands
            next, an ``oracle`` plan, which is always kept.
    """

    name: str
    policy: Policy | Sequence[Policy] | None = None
    loop: LoopConfig = field(default_factory=LoopConfig)
    plan: PlanKind = "newest"

    def __post_init__(self) -> None:
        if self.plan not in get_args(PlanKind):
            raise ValueError(f"plan={self.plan!r} is not one of {', '.join(get_args(PlanKind))}")


class ArmRun:
    """The run of an arm, with everything that it has generated.

    Attributes:
        frames: the decoded pieces of each camera, each ``uint8 [frames_per_latent, height, width, 3]``.
        dit_seconds, end_to_end_seconds: seconds of each chunk; the latter include decoding to frames.
        exact: for each chunk, whether every block was computed.
        held: for each chunk, whether it ran no pass.
        block_seconds, pass_seconds: of full compute, the seconds of each chunk in the blocks of denoising passes, and
            in whole denoising passes. Empty for a cached run, and for one that follows another.
        pieces: the newest pieces, at most those of one cycle.
    """

    def __init__(self, arm: Arm, loop: ClosedLoop[WorldModel], scenario: Scenario) -> None:
        self.arm, self.loop, self.scenario = arm, loop, scenario
        self.frames: dict[str, list[NDArray[np.uint8]]] = {}
        self.pieces: deque[Piece] = deque(maxlen=loop.window_frames)
        self.dit_seconds: list[float] = []
        self.end_to_end_seconds: list[float] = []
        self.exact: list[bool] = []
        self.held: list[bool] = []
        self.block_seconds: list[float] = []
        self.pass_seconds: list[float] = []
        self._clocks: tuple[BlockClock, BlockClock] | None = None
        self._open = ExitStack()
        self._made: list[tuple[Tensor, Tensor]] = []  # latents, and the latents before them
        self._committed: dict[int, Tensor] = {}  # latents, by the number of chunks shown until then

    @classmethod
    def start(cls, arm: Arm, model: WorldModel, scenario: Scenario, *, seed: int) -> ArmRun:
        """A new run on a copy of the model. `close` detaches its cache."""
        own = copy.deepcopy(model)
        cache = attach(own, arm.policy) if arm.policy is not None else None
        loop = ClosedLoop(
            own,
            scenario.start,
            scenario.start_actions,
            config=arm.loop,
            seed=seed,
            cache=cache,
            stream=STREAM,
            track=scenario.track,
        )
        run = cls(arm, loop, scenario)
        if cache is None:
            blocks, passes = (run._open.enter_context(clock_blocks(own, whole=whole)) for whole in (False, True))
            run._clocks = blocks, passes
        own.register_forward_pre_hook(run._see_commit, with_kwargs=True)
        return run

    @property
    def cache(self) -> Cache | None:
        return self.loop.cache if isinstance(self.loop.cache, Cache) else None

    @property
    def position(self) -> int:
        """The position of the next chunk in its cycle."""
        return self.loop.chunk % self.loop.window_frames

    @property
    def plan(self) -> Tensor | None:
        """What the arm's plan is in the next chunk."""
        return self.scenario.plan(self.loop.chunk) if self.arm.plan == "oracle" else None

    def step(self, action: Tensor) -> Piece:
        """Generate the next piece under ``action [A]`` and record it."""
        before = self._clocked()  # forks run on this model, too
        started = perf_counter()
        piece = self.loop.step(action, self.plan)
        for kept, was, now in zip((self.block_seconds, self.pass_seconds), before, self._clocked(), strict=False):
            kept.append(now - was)
        decoded = self.loop.model.codec.decode(piece.latents, piece.before)
        frames = {name: video[0] for name, video in decoded.items()}
        seconds = perf_counter() - started
        self._keep(piece, frames, seconds)
        return piece

    def share(self, other: ArmRun) -> None:
        """Record the newest chunk of another run as this run's."""
        frames = {name: pieces[-1] for name, pieces in other.frames.items()}
        self._keep(other.pieces[-1], frames, other.end_to_end_seconds[-1])

    def adopt(self, other: ArmRun) -> None:
        """Advance this run's loop with the newest chunk of another run, which started it from the same state.

        The frames are decoded here, because the frames before may differ.
        """
        loop, piece, reached = self.loop, replace(other.pieces[-1], before=self.loop.before), other.loop.state
        # At the end of a cycle the emitted pieces are cleared.
        shown = (*loop.state.emitted, piece.latents) if reached.emitted else ()
        loop.state = replace(reached, emitted=shown)
        decoded = loop.model.codec.decode(piece.latents, piece.before)
        frames = {name: video[0] for name, video in decoded.items()}
        self._keep(piece, frames, other.end_to_end_seconds[-1])

    def video(self) -> dict[str, NDArray[np.uint8]]:
        """All frames so far: ``uint8 [T, height, width, 3]`` per camera."""
        return {name: np.concatenate(pieces) for name, pieces in self.frames.items()}

    def depth(self) -> dict[str, NDArray[np.float32]]:
        """The depth of all frames so far in metres: ``float32 [T, height, width]`` per camera."""
        codec = self.loop.model.codec
        pieces = [codec.decode_depth(latents, before) for latents, before in self._made]
        return {name: np.concatenate([piece[name][0] for piece in pieces]) for name in pieces[0]}

    def commit_errors(self) -> list[float]:
        """For each KV update after the start, the mean squared difference of the written and the shown frames.

        In units of 1/255 of a pixel's range.
        """
        codec, found = self.loop.model.codec, []
        for shown, latents in self._committed.items():
            first = shown - self.loop.window_frames
            written = codec.decode(latents, self._made[first][1])
            found.append(
                [
                    (written[name][0].astype(float) - np.concatenate(pieces[first:shown])).ravel()
                    for name, pieces in self.frames.items()
                ]
            )
        return [float(np.square(np.concatenate(errors)).mean()) for errors in found]

    def decisions(self) -> list[Decision]:
        """The cache's decisions in this run, without those of its forks."""
        return [d for d in self.cache.trace if d.stream == STREAM] if self.cache else []

    def shares(self, chunks: range) -> Shares:
        """What blocks and denoising passes took of the DiT time of these chunks, in full compute.

        Raises:
            ValueError: the run has a cache, or follows another.
        """
        if self._clocks is None:
            raise ValueError(f"{self.arm.name!r} is no run of full compute of its own; ask `Race.base`")
        part = slice(chunks.start, chunks.stop)
        total = sum(self.dit_seconds[part])
        return Shares(blocks=sum(self.block_seconds[part]) / total, passes=sum(self.pass_seconds[part]) / total)

    def stats(self) -> Stats | None:
        return self.cache.stats(STREAM) if self.cache else None

    def close(self) -> None:
        self._open.close()
        if self.cache:
            self.cache.detach()

    def _clocked(self) -> tuple[float, ...]:
        return tuple(clock.seconds for clock in self._clocks or ())

    def _see_commit(self, _model: Any, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        if kwargs.get("write") and kwargs["history"] is self.loop.history:  # and not the history of a fork
            self._committed[len(self._made) + 1] = args[0].clone()  # the current chunk included

    def _keep(self, piece: Piece, frames: Mapping[str, NDArray[np.uint8]], seconds: float) -> None:
        for name, video in frames.items():
            self.frames.setdefault(name, []).append(video)
        self.pieces.append(piece)
        self._made.append((piece.latents, piece.before))
        self.dit_seconds.append(piece.dit_seconds)
        self.end_to_end_seconds.append(seconds)
        self.exact.append(piece.exact)
        self.held.append(piece.held)


def fork(loop: ClosedLoop[WorldModel], stream: str) -> ClosedLoop[WorldModel]:
    """An independent copy of a running loop on the same model and cache, as ``stream``."""
    twin = loop.fork(stream)
    if isinstance(loop.cache, Cache):  # and not a follower's _Echo
        loop.cache.fork(loop.stream, stream)
    return twin


class _Echo:
    """In place of a loop's cache: tells whether the leader computed its newest chunk in full."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower

    def step(self, *_args: Any, **_fields: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def exact(self, _stream: str) -> bool:
        return self._follower.full

    def hold(self, **_fields: Any) -> None:
        """A reference runs all its passes."""


class Follower:
    """The full-compute reference that commits the same windows as its leader.

    Until the leader commits another window than the first of a cycle, the follower equals ``base`` and costs nothing.
    After that it is a loop of its own. If the leader computes a chunk in full from the same state, bit for bit, the
    follower adopts the chunk and does not compute it again.
    """

    def __init__(self, leader: ArmRun, base: ArmRun) -> None:
        self.leader, self.base = leader, base
        arm = Arm(name=f"full, committing as {leader.arm.name}", loop=leader.arm.loop, plan=leader.arm.plan)
        self.run = ArmRun(arm, base.loop, base.scenario)
        self._abreast = False

    @property
    def full(self) -> bool:
        """Whether the leader's newest chunk ran, and computed every block."""
        return self.leader.exact[-1] and not self.leader.held[-1]

    @property
    def split(self) -> bool:
        return self.run.loop is not self.base.loop

    def before_leader(self) -> None:
        """Before the leader's chunk: check whether both start it from the same state."""
        self._abreast = self.split and _abreast(self.leader.loop, self.run.loop)

    def before_base(self, position: int) -> None:
        """Between the leader's chunk and the base's: split if the leader computed this chunk in full in mid-cycle."""
        if not self.split and position > 0 and self.full:
            twin = fork(self.base.loop, STREAM)
            twin.config = replace(twin.config, commit=self.leader.arm.loop.commit)
            twin.cache = _Echo(self)
            self.run.loop = twin

    def step(self, action: Tensor) -> None:
        if not self.split:
            self.run.share(self.base)
        elif self._abreast and self.full:
            self.run.adopt(self.leader)
        else:
            self.run.step(action)


def _abreast(one: ClosedLoop[WorldModel], other: ClosedLoop[WorldModel]) -> bool:
    """Whether two loops that commit `last_full` start their next chunks from the same state, bit for bit."""
    first, second = (replace(loop.state, window=None).tensors() for loop in (one, other))
    if one.config.protected == "first":  # then a chunk does not depend on the emitted pieces, see `LoopConfig`
        first, second = ({k: v for k, v in each.items() if "emitted." not in k} for each in (first, second))
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


class Race:
    """Arms and their references, advanced together. Use it as a context manager: leaving it detaches the caches.

    Args:
        model: the model. It is copied, not changed.
        scenario: the scenario to drive.
        arms: arms with different names. An arm without a policy is full compute, which runs once for each cadence and
            plan, and holds no window.
        seed: the seed of the noise, the same for all runs.

    Raises:
        ValueError: two arms have the same name.
    """

    def __init__(self, model: WorldModel, scenario: Scenario, arms: Sequence[Arm], *, seed: int = 0) -> None:
        twice = [name for name, n in Counter(arm.name for arm in arms).items() if n > 1]
        if twice:
            raise ValueError(f"two arms are called {twice[0]!r}; give every arm its own name")
        self.arms, self.scenario = {arm.name: arm for arm in arms}, scenario
        #: The cached runs, by the names of their arms.
        self.runs: dict[str, ArmRun] = {}
        self._bases: dict[tuple[LoopConfig, PlanKind], ArmRun] = {}
        self._followers: dict[str, Follower] = {}
        for arm in arms:
            key = _base_of(arm)
            if key not in self._bases:
                base = Arm(name="full", loop=key[0], plan=arm.plan)
                self._bases[key] = ArmRun.start(base, model, scenario, seed=seed)
            if arm.policy is not None:
                self.runs[arm.name] = ArmRun.start(arm, model, scenario, seed=seed)
                if arm.loop.commit == "last_full":
                    self._followers[arm.name] = Follower(self.runs[arm.name], self._bases[key])

    def __enter__(self) -> Race:
        return self

    def __exit__(self, *_: object) -> None:
        for run in (*self.runs.values(), *self._bases.values()):
            run.close()

    def reference(self, name: str) -> ArmRun:
        """The full-compute run that an arm is compared with."""
        if name in self._followers:
            return self._followers[name].run
        return self.base(name)

    def base(self, name: str) -> ArmRun:
        """The full-compute run of an arm's cadence and plan, with which its time is compared."""
        return self._bases[_base_of(self.arms[name])]

    def step(self, action: Tensor) -> None:
        """Generate one chunk of every run under ``action [A]``. Arms go first, because references may follow them."""
        if not self._followers:  # then the order is free: rotate it, so that no run is always last
            runs = [*self.runs.values(), *self._bases.values()]
            turn = len(runs[0].exact) % len(runs)
            for run in runs[turn:] + runs[:turn]:
                run.step(action)
            return
        for follower in self._followers.values():
            follower.before_leader()
        positions = {name: run.position for name, run in self.runs.items()}
        for run in self.runs.values():
            run.step(action)
        for name, follower in self._followers.items():
            follower.before_base(positions[name])
        for base in self._bases.values():
            base.step(action)
        for follower in self._followers.values():
            follower.step(action)


def _base_of(arm: Arm) -> tuple[LoopConfig, PlanKind]:
    """The cadence and the plan of a reference. Only a cache reads which chunk is announced as committed."""
    emitted = arm.loop.commit == "emitted" and arm.loop.cadence == "window"
    commit: Commit = "emitted" if emitted else "first"
    return replace(arm.loop, protected="first", commit=commit, hold_window=None), arm.plan

"""Runs to be compared, interleaved chunk by chunk in one process.

Every run has its own copy of the model, so that one policy's cache never meets another's. What a cached run is compared
with computes everything under the same cadence, seed and actions *and commits the same windows*: where a commit rule
follows what the cache did (``last_full``), so does its reference, because another history is another video.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdover.engine.attach import attach
from holdover.engine.cache import Cache
from holdover.method import Policy
from holdover.decision import Decision, Stats
from holdover_world.loop.closed_loop import ClosedLoop, LoopConfig, Piece
from holdover_world.loop.scenarios import Scenario
from holdover_world.model.transformer import WorldModel

STREAM = "default"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run a scenario: a policy (None computes everything, with nothing attached) under a cadence."""

    name: str
    policy: Policy | None = None
    loop: LoopConfig = field(default_factory=LoopConfig)


class ArmRun:
    """An arm under way, and what it has made.

    Attributes:
        frames: per camera the decoded pieces, each ``uint8 [frames_per_latent, height, width, 3]``.
        dit_seconds, end_to_end_seconds: per chunk; the latter with decoding to frames.
        exact: per chunk, whether every block was computed.
        pieces: the newest as generated, those of one cycle.
    """

    def __init__(self, arm: Arm, loop: ClosedLoop) -> None:
        self.arm, self.loop = arm, loop
        self.frames: dict[str, list[NDArray[np.uint8]]] = {}
        self.pieces: deque[Piece] = deque(maxlen=loop.window_frames)
        self.dit_seconds: list[float] = []
        self.end_to_end_seconds: list[float] = []
        self.exact: list[bool] = []
        self._made: list[tuple[Tensor, Tensor]] = []  # latents, and those shown before them
        self._committed: dict[int, Tensor] = {}  # latents, by how many chunks had been shown

    @classmethod
    def start(cls, arm: Arm, model: WorldModel, scenario: Scenario, *, seed: int) -> ArmRun:
        """A new run on a copy of the model. `close` takes its cache off again."""
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
        lane = cls(arm, loop)
        own.register_forward_pre_hook(lane._see_commit, with_kwargs=True)
        return lane

    @property
    def cache(self) -> Cache | None:
        return self.loop.cache

    @property
    def position(self) -> int:
        """Where in its cycle the next chunk stands."""
        return self.loop.chunk % self.loop.window_frames

    def step(self, action: Tensor) -> Piece:
        """Generate the next piece under ``action [A]``, and keep it."""
        started = perf_counter()
        piece = self.loop.step(action)
        decoded = self.loop.model.codec.decode(piece.latents, piece.before)
        frames = {name: video[0] for name, video in decoded.items()}
        seconds = perf_counter() - started
        self._keep(piece, frames, seconds)
        return piece

    def share(self, other: ArmRun) -> None:
        """Take the newest chunk of another lane as one's own."""
        frames = {name: pieces[-1] for name, pieces in other.frames.items()}
        self._keep(other.pieces[-1], frames, other.end_to_end_seconds[-1])

    def adopt(self, other: ArmRun) -> None:
        """Take the newest chunk of another lane, which began it from the same, as what one's own loop has made.

        Frames are one's own, for what was shown before may differ.
        """
        loop, piece, reached = self.loop, replace(other.pieces[-1], before=self.loop.before), other.loop.state
        # At a cycle's end nothing of it is left.
        shown = (*loop.state.emitted, piece.latents) if reached.emitted else ()
        loop.state = replace(reached, emitted=shown)
        decoded = loop.model.codec.decode(piece.latents, piece.before)
        frames = {name: video[0] for name, video in decoded.items()}
        self._keep(piece, frames, other.end_to_end_seconds[-1])

    def video(self) -> dict[str, NDArray[np.uint8]]:
        """Per camera all frames so far ``uint8 [T, height, width, 3]``."""
        return {name: np.concatenate(pieces) for name, pieces in self.frames.items()}

    def depth(self) -> dict[str, NDArray[np.float32]]:
        """Per camera the depth of all frames so far ``float32 [T, height, width]``, in metres."""
        codec = self.loop.model.codec
        pieces = [codec.decode_depth(latents, before) for latents, before in self._made]
        return {name: np.concatenate([piece[name][0] for piece in pieces]) for name in pieces[0]}

    def commit_errors(self) -> list[float]:
        """Per KV update after the start, the mean squared difference of what it wrote and what had been shown.

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
        """The cache's decisions in this run, its forks left out."""
        return [d for d in self.cache.trace if d.stream == STREAM] if self.cache else []

    def stats(self) -> Stats | None:
        return self.cache.stats(STREAM) if self.cache else None

    def close(self) -> None:
        if self.cache:
            self.cache.detach()

    def _see_commit(self, _model: Any, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        if kwargs.get("write") and kwargs["cache"] is self.loop.kv:  # and not that of a fork
            self._committed[len(self._made) + 1] = args[0].clone()  # with the chunk under way

    def _keep(self, piece: Piece, frames: Mapping[str, NDArray[np.uint8]], seconds: float) -> None:
        for name, video in frames.items():
            self.frames.setdefault(name, []).append(video)
        self.pieces.append(piece)
        self._made.append((piece.latents, piece.before))
        self.dit_seconds.append(piece.dit_seconds)
        self.end_to_end_seconds.append(seconds)
        self.exact.append(piece.exact)


def fork(loop: ClosedLoop, stream: str) -> ClosedLoop:
    """A copy of a running loop that goes its own way, on the same model and cache, as ``stream``."""
    shared = {id(loop.model): loop.model, id(loop.cache): loop.cache}
    twin = copy.deepcopy(loop, shared)
    twin.stream = stream
    if isinstance(loop.cache, Cache):  # and not the echo of a follower
        loop.cache.fork(loop.stream, stream)
    return twin


class _Echo:
    """Stands where a loop expects its cache and repeats whether the leader computed its chunk in full."""

    def __init__(self, leader: ArmRun) -> None:
        self._leader = leader

    def step(self, **_fields: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def exact(self, _stream: str) -> bool:
        return self._leader.exact[-1]


class Follower:
    """Full compute that commits the windows its leader commits.

    Until the leader first commits another window than its cycle's first, this is the reference ``base``, and costs
    nothing; from then on it is a loop of its own. What the leader computes in full from where this loop stands as well,
    bit for bit, is what this loop would compute, and is not computed again.
    """

    def __init__(self, leader: ArmRun, base: ArmRun) -> None:
        self.leader, self.base = leader, base
        self.lane = ArmRun(Arm(name=f"full, committing as {leader.arm.name}", loop=leader.arm.loop), base.loop)
        self._abreast = False

    @property
    def split(self) -> bool:
        return self.lane.loop is not self.base.loop

    def before_leader(self) -> None:
        """Before the leader's chunk: see whether both are to make the same of it."""
        self._abreast = self.split and _abreast(self.leader.loop, self.lane.loop)

    def before_base(self, position: int) -> None:
        """Between the leader's chunk and the base's: part from the base if the leader did."""
        if not self.split and position > 0 and self.leader.exact[-1]:
            twin = fork(self.base.loop, STREAM)
            twin.config = replace(twin.config, commit=self.leader.arm.loop.commit)
            twin.cache = cast(Cache, _Echo(self.leader))
            self.lane.loop = twin

    def step(self, action: Tensor) -> None:
        if not self.split:
            self.lane.share(self.base)
        elif self._abreast and self.leader.exact[-1]:
            self.lane.adopt(self.leader)
        else:
            self.lane.step(action)


def _abreast(one: ClosedLoop, other: ClosedLoop) -> bool:
    """Whether the next chunks of two loops that commit `last_full` are made from the same, bit for bit."""
    first, second = one.state.tensors(), other.state.tensors()
    if one.config.protected == "first":  # then what was shown before is not known to a chunk, see `LoopConfig`
        first, second = ({k: v for k, v in each.items() if "emitted." not in k} for each in (first, second))
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


class Race:
    """Arms and their references, advancing together.

    Args:
        model: is copied, not changed.
        scenario: what to drive.
        arms: names must differ. One without a policy is full compute, which is run once per cadence.
        seed: of the noise, the same for all.

    Use as a context manager: leaving it takes the caches off.
    """

    def __init__(self, model: WorldModel, scenario: Scenario, arms: Sequence[Arm], *, seed: int = 0) -> None:
        twice = [name for name, n in Counter(arm.name for arm in arms).items() if n > 1]
        if twice:
            raise ValueError(f"two arms are called {twice[0]!r}; give every arm its own name")
        self.arms = {arm.name: arm for arm in arms}
        #: The cached runs.
        self.lanes: dict[str, ArmRun] = {}
        self._bases: dict[LoopConfig, ArmRun] = {}
        self._followers: dict[str, Follower] = {}
        for arm in arms:
            key = _base_config(arm.loop)
            if key not in self._bases:
                self._bases[key] = ArmRun.start(Arm(name="full", loop=key), model, scenario, seed=seed)
            if arm.policy is not None:
                self.lanes[arm.name] = ArmRun.start(arm, model, scenario, seed=seed)
                if arm.loop.commit == "last_full":
                    self._followers[arm.name] = Follower(self.lanes[arm.name], self._bases[key])

    def __enter__(self) -> Race:
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self.lanes.values():
            lane.close()

    def reference(self, name: str) -> ArmRun:
        """The full-compute run that an arm is compared with."""
        if name in self._followers:
            return self._followers[name].lane
        return self.base(name)

    def base(self, name: str) -> ArmRun:
        """The full-compute run of an arm's cadence: what its time is compared with."""
        return self._bases[_base_config(self.arms[name].loop)]

    def step(self, action: Tensor) -> None:
        """One chunk of every run under ``action [A]``, arms first: their references may follow them."""
        if not self._followers:  # then the order is free, and nobody always comes last
            runs = [*self.lanes.values(), *self._bases.values()]
            turn = len(runs[0].exact) % len(runs)
            for lane in runs[turn:] + runs[:turn]:
                lane.step(action)
            return
        for follower in self._followers.values():
            follower.before_leader()
        positions = {name: lane.position for name, lane in self.lanes.items()}
        for lane in self.lanes.values():
            lane.step(action)
        for name, follower in self._followers.items():
            follower.before_base(positions[name])
        for base in self._bases.values():
            base.step(action)
        for follower in self._followers.values():
            follower.step(action)


def _base_config(loop: LoopConfig) -> LoopConfig:
    """The cadence of a reference: which chunk is announced as committed matters only to a cache."""
    emitted = loop.commit == "emitted" and loop.cadence == "window"
    return replace(loop, protected="first", commit="emitted" if emitted else "first")

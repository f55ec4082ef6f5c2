"""A session: one closed loop that a client owns. Many sessions advance in one forward pass."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdover.decision import Decision
from holdover.engine.snapshot import Snapshot
from holdover.engine.tensor_file import read_tensors, write_tensors
from holdover_world.loop import batch
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.state import LoopState
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.cameras import FPS
from holdover_world.sessions.world import World

FORMAT = "session 3"

#: A normalised action ``[A]``.
Command = Sequence[float] | Tensor


@dataclass(frozen=True, kw_only=True)
class SessionSnapshot:
    """The state of a session: its tensors, and the rest as plain JSON values. Restore it here or in another process."""

    plain: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.safetensors`` file. The file is complete, or it is not written."""
        write_tensors(Path(path), {"format": FORMAT, **self.plain}, self.tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SessionSnapshot:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a session snapshot of this format.
        """
        plain, tensors = read_tensors(Path(path), "write one with session.snapshot().save(path)", format=FORMAT)
        return cls(plain=plain, tensors=tensors)


@dataclass(frozen=True, kw_only=True)
class SessionChunk:
    """One chunk of a session.

    Attributes:
        index: its number, from 0 at the reset.
        frames: ``uint8 [T, height, width, 3]`` per camera.
        decisions: one for each block of each pass.
        exact: whether every block was computed.
        held: whether it shows a frame of the window in hand, without a pass (`LoopConfig.hold_window`).
        seconds: compute time of the batch that it was part of.
        batch: the number of sessions in that batch.
        depth: ``float32 [T, height, width]`` per camera, metres along the viewing axis. Empty if the world has none.
    """

    index: int
    frames: Mapping[str, NDArray[np.uint8]]
    decisions: Sequence[Decision]
    exact: bool
    seconds: float
    batch: int
    depth: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    held: bool = False


class Told(NamedTuple):
    """What a session is told in one chunk, as the loop takes it."""

    action: Tensor
    plan: Tensor | None


class SavePoint(NamedTuple):
    """The state of a session before a chunk, to roll back to. ``backup`` is the cache's stream that holds its part."""

    state: LoopState
    backup: str | None


class WorldSession:
    """One video of a world, driven action by action. It owns a KV cache, cache entries, noise and a clock.

    Args:
        world: the model it runs on.
        policy: the name of one of the world's policies; by default the first.

    `reset` or `restore` begins the video. A chunk either completes or leaves the session unchanged.
    Use a session as a context manager, or `close` it.
    """

    def __init__(self, world: World, *, policy: str | None = None) -> None:
        self.world, self.policy = world, policy or world.default_policy
        world.attached(self.policy)
        self.scenario: str | None = None
        self.seed = 0
        self._stream: str | None = world.stream()
        self._loop: ClosedLoop[WorldModel] | None = None
        self._ran = False  # whether the cache holds entries of this session

    def __enter__(self) -> WorldSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def loop(self) -> ClosedLoop[WorldModel]:
        """The session's loop.

        Raises:
            ValueError: the session has no video yet, or is closed.
        """
        if self._loop is None:
            raise ValueError("the session has no video; call reset(scenario, seed) or restore(snapshot)")
        return self._loop

    @property
    def chunk(self) -> int:
        """The number of the next chunk."""
        return self.loop.chunk

    @property
    def seconds(self) -> float:
        """Seconds of video since the reset."""
        return self.chunk * self.world.model.sizes.frames_per_latent / FPS

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors. Memory that forks share is counted for each of them."""
        held = self.world.attached(self.policy).cache.stats(self._name).bytes_held if self._ran else 0
        return held + sum(tensor.nbytes for tensor in self.loop.state.tensors().values())

    def reset(self, scenario: str, seed: int = 0) -> None:
        """Begin a new video.

        Raises:
            ValueError: the world has no such scenario, or the seed is out of range.
        """
        if scenario not in self.world.starts:
            raise ValueError(f"scenario {scenario!r} is not one of {', '.join(self.world.starts)}")
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed!r}: give a whole number from 0 to 2**63 - 1")
        stream, start = self._name, self.world.starts[scenario]
        model, cache = self.world.attached(self.policy)
        loop = ClosedLoop(
            model,
            start.latents,
            start.actions,
            config=self.world.loop,
            seed=seed,
            cache=cache,
            stream=stream,
            track=start.track,
        )
        cache.trace.clear()
        cache.reset(stream)
        self._loop, self._ran, self.scenario, self.seed = loop, False, scenario, seed

    def step(self, action: Command, plan: Sequence[Command] | Tensor | None = None) -> SessionChunk:
        """Generate the next chunk.

        Args:
            action: a normalised command ``[A]``.
            plan: what is intended for the latent frames that are not yet commanded, ``[T, A]``, see `ClosedLoop.step`.
                None: the newest action is held.

        Raises:
            ValueError: action or plan do not fit the model. The session is unchanged.
        """
        result = advance([self], [action], [plan])[0]
        if isinstance(result, Exception):
            raise result
        return result

    def fork(self) -> WorldSession:
        """A second session that continues from here, independent of this one. They share memory until they diverge."""
        twin = WorldSession(self.world, policy=self.policy)
        model, cache = self.world.attached(self.policy)
        twin._loop = ClosedLoop.resume(model, self.loop.state, config=self.loop.config, cache=cache, stream=twin._name)
        if self._ran:
            cache.fork(self._name, twin._name)
        twin.scenario, twin.seed, twin._ran = self.scenario, self.seed, self._ran
        return twin

    def use(self, policy: str) -> None:
        """Continue under another policy. The cache entries are dropped.

        Raises:
            ValueError: the world does not offer this policy.
        """
        model, cache = self.world.attached(policy)
        if policy == self.policy:
            return
        state = replace(self.loop.state, window=None)  # the new policy shows what it made itself
        loop = ClosedLoop.resume(model, state, config=self.loop.config, cache=cache, stream=self._name)
        self._forget()
        self._loop, self.policy = loop, policy

    def snapshot(self) -> SessionSnapshot:
        """The session's state."""
        tensors = {f"loop.{name}": tensor for name, tensor in self.loop.state.tensors().items()}
        held = None
        if self._ran:
            snapshot = self.world.attached(self.policy).cache.snapshot(self._name)
            held = snapshot.plain
            tensors |= {f"held.{name}": tensor for name, tensor in snapshot.tensors.items()}
        plain = {
            "scenario": self.scenario,
            "seed": self.seed,
            "policy": self.policy,
            "model": self.world.digest,
            "loop": _plain(self.loop.config),
            "held": held,
        }
        return SessionSnapshot(plain=plain, tensors=tensors)

    def restore(self, snapshot: SessionSnapshot) -> None:
        """Continue from a snapshot. The video is the same, bit for bit.

        Raises:
            ValueError: it was taken of another model, policy or cadence. The session is unchanged.
        """
        plain, config = snapshot.plain, self.world.loop
        if plain["model"] != self.world.digest:
            raise ValueError("the snapshot was taken of another model; restore it in a world of that model")
        if plain["loop"] != _plain(config):
            raise ValueError(f"the snapshot was taken under {plain['loop']}, this world runs {_plain(config)}")
        model, cache = self.world.attached(plain["policy"])
        own = {n[5:]: t.to(self.world.device) for n, t in snapshot.tensors.items() if n.startswith("loop.")}
        own["noise_source"] = own["noise_source"].cpu()
        state = LoopState.from_tensors(own, model)
        loop = ClosedLoop.resume(model, state, config=config, cache=cache, stream=self._name)
        if (held := plain["held"]) is not None:
            if held["policies"] != [repr(self.world.policies[plain["policy"]])]:
                taken = ", ".join(held["policies"])
                raise ValueError(f"the snapshot was taken under {taken}; offer it as {plain['policy']!r}")
            tensors = {name[5:]: tensor for name, tensor in snapshot.tensors.items() if name.startswith("held.")}
            self._forget()
            cache.restore(self._name, Snapshot.of(held, tensors))
        else:
            self._forget()
        self._loop, self._ran, self.policy = loop, held is not None, plain["policy"]
        self.scenario, self.seed = plain["scenario"], plain["seed"]

    def close(self) -> None:
        """Free the session's memory. Closing again does nothing."""
        if self._stream is None:
            return
        self._forget()
        self.world.free(self._stream)
        self._loop = self._stream = None

    def intended(self, plan: Sequence[Command] | Tensor | None) -> Tensor | None:
        """A plan as the tensor ``[T, A]`` that the loop takes; None for none.

        Raises:
            ValueError: one of its rows is not A finite numbers in [-1, 1].
        """
        if plan is None:
            return None
        rows = [self.command(action, f"plan[{n}]") for n, action in enumerate(_listed(plan))]
        return torch.stack(rows) if rows else None

    def command(self, action: Command, name: str = "action") -> Tensor:
        """An action as the tensor ``[A]`` that the model takes.

        Raises:
            ValueError: the action is not A finite numbers in [-1, 1].
        """
        dims = self.world.model.sizes.action_dims
        try:
            values = [float(value) for value in action]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}={action!r} is not a list of numbers; give {dims} in [-1, 1]") from error
        if len(values) != dims or not all(math.isfinite(value) and -1 <= value <= 1 for value in values):
            raise ValueError(f"{name}={values}: give {dims} finite numbers in [-1, 1]")
        return torch.tensor(values)

    def save_point(self) -> SavePoint:
        """The state before a chunk. `commit` or `roll_back` ends the chunk."""
        backup = f"{self._name} before" if self._ran else None
        if backup is not None:
            self.world.attached(self.policy).cache.fork(self._name, backup)
        return SavePoint(self.loop.state, backup)

    def roll_back(self, saved: SavePoint) -> None:
        """Return to the save point: the chunk failed."""
        cache = self.world.attached(self.policy).cache
        self.loop.state = saved.state
        cache.reset(self._name)
        if saved.backup is not None:
            cache.fork(saved.backup, self._name)
            cache.reset(saved.backup)

    def commit(self) -> None:
        """Drop the save point: the chunk completed."""
        self.world.attached(self.policy).cache.reset(f"{self._name} before")
        self._ran = True

    @property
    def _name(self) -> str:
        if self._stream is None:
            raise ValueError("the session is closed")
        return self._stream

    def _forget(self) -> None:
        self.world.attached(self.policy).cache.reset(self._name)
        self._ran = False


def _plain(config: LoopConfig) -> dict[str, Any]:
    """A cadence in JSON's terms, in which tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def _listed(plan: Sequence[Command] | Tensor) -> list[Command]:
    try:
        return list(plan)
    except TypeError as error:
        raise ValueError(f"plan={plan!r} is not a list of actions; give one for each frame ahead, or None") from error


def advance(
    sessions: Sequence[WorldSession],
    actions: Sequence[Command],
    plans: Sequence[Sequence[Command] | Tensor | None] | None = None,
) -> list[SessionChunk | Exception]:
    """Generate one chunk of every session of one world. Sessions that fit together share a forward pass.

    The result holds a chunk or an error for each session. A session whose chunk fails is unchanged, and the others
    continue. Each session may have a plan, see `WorldSession.step`.

    Raises:
        ValueError: an action or a plan does not fit the model. No session has advanced.
    """
    plans = [None] * len(sessions) if plans is None else plans
    told = [
        Told(session.command(action), session.intended(plan))
        for session, action, plan in zip(sessions, actions, plans, strict=True)
    ]
    results: dict[int, SessionChunk | Exception] = {}
    for members in batch.batches([session.loop for session in sessions]):
        made = _advance([sessions[n] for n in members], [told[n] for n in members])
        results |= zip(members, made, strict=True)
    return [results[n] for n in range(len(sessions))]


def _advance(sessions: Sequence[WorldSession], told: Sequence[Told]) -> list[SessionChunk | Exception]:
    """`advance` for sessions that fit into one batch."""
    world, started = sessions[0].world, perf_counter()
    cache = world.attached(sessions[0].policy).cache
    save_points = [session.save_point() for session in sessions]
    try:
        loops = [session.loop for session in sessions]
        pieces = batch.advance(loops, [each.action for each in told], [each.plan for each in told])
        shown = [(world.frames(piece), world.depth(piece)) for piece in pieces]
    except BaseException as error:
        for session, saved in zip(sessions, save_points, strict=True):
            session.roll_back(saved)
        cache.trace.clear()
        if not isinstance(error, Exception):
            raise
        if len(sessions) == 1:
            return [error]
        # Any of them may have caused the error: run each alone.
        return [_advance([one], [each])[0] for one, each in zip(sessions, told, strict=True)]
    decisions: dict[str, list[Decision]] = {}
    for decision in cache.trace:
        decisions.setdefault(decision.stream, []).append(decision)
    cache.trace.clear()
    seconds = perf_counter() - started
    results: list[SessionChunk | Exception] = []
    for session, piece, (frames, depth) in zip(sessions, pieces, shown, strict=True):
        session.commit()
        results.append(
            SessionChunk(
                index=session.chunk - 1,
                frames=frames,
                depth=depth,
                decisions=decisions.get(session.loop.stream, []),
                exact=piece.exact,
                held=piece.held,
                seconds=seconds,
                batch=len(sessions),
            )
        )
    return results

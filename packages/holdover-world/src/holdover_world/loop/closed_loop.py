"""The closed loop: an action comes in, the next piece of video goes out. It drives any `LoopModel`.

*Window cadence*, our reading of X-Cache (arXiv 2604.20289): the chunks of a cycle generate one window again and again,
with the same noise. Each chunk takes the newest action and emits one more latent frame. A clean pass then writes one of
these windows into the KV cache. *Plain cadence*: each chunk generates a new window of one latent frame and commits it.

Shape suffixes: B batch, F latent frames, N tokens of one latent frame, P values of one token, A dimensions of the
action, S denoising passes of a chunk, T chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from holdover.step import Step
from holdover_world.loop.protocol import History, Located, LoopCache, LoopModel, Saved, Stacks
from holdover_world.model.sampler import Sampler, denoise, noise_levels

Cadence = Literal["window", "plain"]
Commit = Literal["first", "last_full", "emitted"]
M = TypeVar("M", bound=LoopModel)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How chunks follow each other.

    Attributes:
        cadence: ``window`` or ``plain``.
        commit: the latents of a cycle that the clean pass writes: the window of its ``first`` chunk, the window of the
            ``last_full`` chunk, which is the last one computed in full, or the pieces as ``emitted``. A chunk starts
            from the pieces emitted before its own. With ``last_full`` and the first chunk protected, it starts from
            these frames in the window to be committed, so that nothing served from cache is committed.
        protected: the chunk of a cycle that is announced as committed, ``first`` or ``last``. Policies with KV
            protection compute it in full.
        fresh_noise: draw new noise for every chunk instead of every cycle.
        sampler: how a pass continues the pass before: with new noise (``renoise``), or by Euler's step along the flow
            (``euler``), for many steps.
        guidance: scale of classifier-free guidance on the action (Ho & Salimans, arXiv 2207.12598). Every pass is also
            made without the action, as branch "uncond". 1 means no guidance.
        steps: denoising passes per chunk.
        shift: timestep shift of the noise levels.
    """

    cadence: Cadence = "window"
    commit: Commit = "first"
    protected: Literal["first", "last"] = "first"
    fresh_noise: bool = False
    sampler: Sampler = "renoise"
    guidance: float = 1.0
    steps: int = 4
    shift: float = 5.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("cadence", self.cadence, get_args(Cadence)),
            ("commit", self.commit, get_args(Commit)),
            ("protected", self.protected, ("first", "last")),
            ("sampler", self.sampler, get_args(Sampler)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if not 1 <= self.guidance < float("inf"):
            raise ValueError(f"guidance={self.guidance}: give 1 for none, or a larger number")
        noise_levels(self.steps, self.shift)

    @classmethod
    def of_steps(cls, steps: int, cadence: Cadence = "window") -> LoopConfig:
        """A loop of this many steps with the sampler for them: ``renoise`` up to the default, ``euler`` above."""
        return cls(cadence=cadence, steps=steps, sampler="renoise" if steps <= cls.steps else "euler")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The output of one chunk.

    Attributes:
        latents: the emitted latent frame, ``float32 [B, 1, N, P]``.
        before: the latent frame before it, ``[B, N, P]``, which decoding needs. For the first piece of a cycle this is
            the newest committed frame, from which its window continues, so nothing served from cache gets into it.
        dit_seconds: time in the transformer for the whole batch, including the KV update that ends a cycle.
        exact: whether every block was computed.
    """

    latents: Tensor
    before: Tensor
    dit_seconds: float
    exact: bool


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """Where a loop stands, without the entries of its cache. It shares memory with the loop; do not write into it.

    Attributes:
        history: what the model remembers of the video.
        last: the newest committed latent frame, ``[B, N, P]``.
        chunk: the number of the next chunk.
        noise_source: the state of the generator that draws the noise.
        noise: the noise of the cycle, ``[S, B, F, N, P]``; None at the beginning of a cycle.
        emitted, actions: the pieces ``[B, 1, N, P]`` and actions ``[B, A]`` of the cycle so far, one per chunk.
        committed: the latents ``[B, F, N, P]`` and actions ``[B, F, A]`` that the KV update will write.
    """

    history: History
    last: Tensor
    chunk: int
    noise_source: Tensor
    noise: Tensor | None
    emitted: tuple[Tensor, ...]
    actions: tuple[Tensor, ...]
    committed: tuple[Tensor, Tensor] | None

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name.

        Raises:
            TypeError: the model's history cannot be saved (`Saved`).
        """
        if not isinstance(self.history, Saved):
            raise TypeError(f"a {type(self.history).__name__} cannot be saved; give it state_dict and load_state_dict")
        named = {f"history.{name}": tensor for name, tensor in self.history.state_dict().items()}
        named |= {"last": self.last, "chunk": torch.tensor(self.chunk), "noise_source": self.noise_source}
        named |= {"noise": self.noise} if self.noise is not None else {}
        named |= {f"emitted.{n}": piece for n, piece in enumerate(self.emitted)}
        named |= {f"actions.{n}": action for n, action in enumerate(self.actions)}
        if self.committed is not None:
            named["committed.latents"], named["committed.actions"] = self.committed
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], model: LoopModel) -> LoopState:
        """The reverse of `tensors`, for this model."""
        history = model.new_history()
        own = {name.removeprefix("history."): t for name, t in tensors.items() if name.startswith("history.")}
        history.load_state_dict(own)
        count = sum(name.startswith("emitted.") for name in tensors)
        committed = "committed.latents" in tensors
        return cls(
            history=history,
            last=tensors["last"],
            chunk=int(tensors["chunk"]),
            noise_source=tensors["noise_source"],
            noise=tensors.get("noise"),
            emitted=tuple(tensors[f"emitted.{n}"] for n in range(count)),
            actions=tuple(tensors[f"actions.{n}"] for n in range(count)),
            committed=(tensors["committed.latents"], tensors["committed.actions"]) if committed else None,
        )


class ClosedLoop(Generic[M]):
    """One stream of a model, driven action by action.

    Args:
        model: the model, with or without a cache attached.
        start: clean latents ``[B, F, N, P]`` that the video begins with, whole windows. They are written into the
            history.
        start_actions: their normalised actions ``[B, F, A]``.
        config: the cadence.
        seed: of the noise.
        cache: what `holdover.attach` returned for this model; None computes everything.
        stream: the name of this stream in the cache.
        track: what the start was recorded along, for a model whose history is `Located`.

    Raises:
        ValueError: the start is not whole windows with their actions, or the model has no use for a track.
    """

    def __init__(
        self,
        model: M,
        start: Tensor,
        start_actions: Tensor,
        *,
        config: LoopConfig | None = None,
        seed: int = 0,
        cache: LoopCache | None = None,
        stream: str = "default",
        track: Any = None,
    ) -> None:
        window = model.sizes.window
        if start.shape[1] == 0 or start.shape[1] % window:
            raise ValueError(f"start has {start.shape[1]} latent frames; give a multiple of the window, {window}")
        if start_actions.shape[:2] != start.shape[:2]:
            raise ValueError(f"start_actions {tuple(start_actions.shape)} do not match start {tuple(start.shape)}")
        self._set_up(model, config or LoopConfig(), cache, stream)
        history: History = model.new_history()
        if track is not None and not isinstance(history, Located):
            raise ValueError(f"a {type(history).__name__} has no place on a map; leave track out")
        self.history = history
        self.chunk = 0
        self._noise_source = torch.Generator(start.device).manual_seed(seed)
        self._committed: tuple[Tensor, Tensor] | None = None
        self._begin_cycle()
        length = 1 if self.config.cadence == "plain" else window
        for first in range(0, start.shape[1], length):
            part = slice(first, first + length)
            _write_history([self], [(start[:, part], start_actions[:, part])])
            if isinstance(history, Located) and track is not None:
                history.follow(track)

    @classmethod
    def resume(
        cls,
        model: M,
        state: LoopState,
        *,
        config: LoopConfig | None = None,
        cache: LoopCache | None = None,
        stream: str = "default",
    ) -> ClosedLoop[M]:
        """A loop that continues from a state. The cache restores its own entries."""
        loop = cls.__new__(cls)
        loop._set_up(model, config or LoopConfig(), cache, stream)
        loop._noise_source = torch.Generator(state.last.device)
        loop.state = state
        return loop

    def fork(self, stream: str) -> ClosedLoop[M]:
        """An independent loop that continues from here as another stream. The cache forks its own entries."""
        return ClosedLoop.resume(self.model, self.state, config=self.config, cache=self.cache, stream=stream)

    def _set_up(self, model: M, config: LoopConfig, cache: LoopCache | None, stream: str) -> None:
        self.model, self.config, self.cache, self.stream = model, config, cache, stream
        self.sigmas = noise_levels(config.steps, config.shift)

    @property
    def window_frames(self) -> int:
        """Latent frames denoised together."""
        return 1 if self.config.cadence == "plain" else self.model.sizes.window

    @property
    def rows(self) -> int:
        """B, the number of videos that the loop advances together."""
        return len(self.last)

    @property
    def before(self) -> Tensor:
        """The latent frame before the next piece, ``[B, N, P]`` (see `Piece`)."""
        return self._emitted[-1][:, -1] if self._emitted else self.last

    @property
    def state(self) -> LoopState:
        """Where the loop stands. Assign it to this loop or another to go back there, any number of times."""
        return LoopState(
            history=self.history.fork(),
            last=self.last,
            chunk=self.chunk,
            noise_source=self._noise_source.get_state(),
            noise=self._noise,
            emitted=tuple(self._emitted),
            actions=tuple(self._actions),
            committed=self._committed,
        )

    @state.setter
    def state(self, state: LoopState) -> None:
        self.history, self.last, self.chunk = state.history.fork(), state.last, state.chunk
        self._noise_source.set_state(state.noise_source)
        self._noise: Tensor | None = state.noise
        self._emitted, self._actions, self._committed = list(state.emitted), list(state.actions), state.committed

    def step(self, action: Tensor) -> Piece:
        """Generate the next piece under the newest normalised action, ``[B, A]`` or ``[A]``."""
        return advance([self], [action])[0]

    def run(self, actions: Tensor) -> Iterator[Piece]:
        """Generate one piece per action of ``actions``, ``[T, A]`` or ``[T, B, A]``."""
        for action in actions:
            yield self.step(action)

    def _begin_cycle(self) -> None:
        self._emitted = []
        self._actions = []
        self._noise = None

    def _begin(self, action: Tensor) -> _ChunkInputs:
        """Take an action and return the inputs of the next chunk."""
        last_BNP = self.last
        action_BA = action.to(last_BNP.device, torch.float32).expand(len(last_BNP), -1)
        if self._noise is None or self.config.fresh_noise:
            draws = 1 if self.config.sampler == "euler" else self.config.steps
            draw = draws, len(last_BNP), self.window_frames, *last_BNP.shape[1:]
            self._noise = torch.randn(draw, generator=self._noise_source, device=last_BNP.device)
        position = len(self._emitted)
        self._actions.append(action_BA)
        ahead = [action_BA] * (self.window_frames - position - 1)
        actions_BFA = torch.stack(self._actions + ahead, 1)
        first_protected = self.config.protected == "first"
        announced = 0 if first_protected else self.window_frames - 1
        if self._committed is not None and self.config.commit == "last_full" and first_protected:
            known = self._committed[0][:, :position]
        else:
            known = torch.cat([self._noise[0, :, :0], *self._emitted], 1)
        return _ChunkInputs(
            action=action_BA,
            actions_BFA=actions_BFA,
            frame_actions=actions_BFA.transpose(0, 1).flatten(1).tolist(),
            shown=None if self.config.cadence == "plain" else position,
            noise_SBFNP=self._noise,
            known_BFNP=known,
            commits=position == announced,
        )

    def _finish(self, inputs: _ChunkInputs, window: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Emit the next piece of a window and choose what will be committed.

        Returns:
            The piece, the latent frame before it, and whether the chunk is exact.
        """
        exact = self.cache is None or self.cache.exact(self.stream)
        position = len(self._emitted)
        before, piece = self.before, window[:, position : position + 1].clone()
        self._emitted.append(piece)
        if position == 0 or (self.config.commit == "last_full" and exact):
            self._committed = window, inputs.actions_BFA
        if len(self._emitted) == self.window_frames and self.config.commit == "emitted":
            self._committed = torch.cat(self._emitted, 1), torch.stack(self._actions, 1)
        return piece, before, exact


@dataclass(frozen=True, kw_only=True)
class _ChunkInputs:
    """The inputs of one chunk of one loop."""

    action: Tensor
    actions_BFA: Tensor
    frame_actions: list[list[float]]
    shown: int | None
    noise_SBFNP: Tensor
    known_BFNP: Tensor
    commits: bool


@torch.inference_mode()
def advance(loops: Sequence[ClosedLoop[Any]], actions: Sequence[Tensor]) -> list[Piece]:
    """Generate the next piece of every loop in one batch.

    Several loops must share a model that stacks histories, a cache and a cadence, have one row each, and hold equally
    many latent frames in their KV caches; `batches` sorts them so. They may stand at different positions of their
    cycles. Each gets what it would get alone, except for rounding. If this raises, the loops are left in mid-chunk;
    assign their earlier `ClosedLoop.state`.

    Args:
        loops: the loops.
        actions: for each loop the newest normalised action, ``[B, A]`` or ``[A]``.

    Raises:
        ValueError: the loops do not go together.
    """
    if len(batches(loops)) > 1 or (len(loops) > 1 and any(loop.rows != 1 for loop in loops)):
        raise ValueError(
            "loops of one batch share a model that stacks histories, a cache, a cadence and a KV length, and have one "
            "row each; sort them by `batches`"
        )
    inputs = [loop._begin(action) for loop, action in zip(loops, actions, strict=True)]
    actions_BFA = torch.cat([each.actions_BFA for each in inputs])
    seconds = [0.0]

    def predict(index: int, noisy: Tensor) -> Tensor:
        sigma, config = loops[0].sigmas[index], loops[0].config
        fields: list[dict[str, Any]] = [
            {
                "index": index,
                "num_steps": config.steps,
                "sigma": sigma,
                "action": each.action,
                "frame_actions": each.frame_actions,
                "shown": each.shown,
                "commits": each.commits,
            }
            for each in inputs
        ]
        output, took = _forward(loops, fields, noisy, sigma=sigma, action_BFA=actions_BFA)
        seconds.append(took)
        if config.guidance == 1:
            return output
        free = [{**each, "branch": "uncond", "frame_actions": None} for each in fields]
        unguided, took = _forward(loops, free, noisy, sigma=sigma, action_BFA=None)
        seconds.append(took)
        return unguided + config.guidance * (output - unguided)

    noise = torch.cat([each.noise_SBFNP for each in inputs], 1)
    known = [row for each in inputs for row in each.known_BFNP]
    window = denoise(predict, noise, loops[0].sigmas, known, sampler=loops[0].config.sampler)
    windows = window.split([len(each.action) for each in inputs])
    if len(loops) > 1:  # a view would keep the whole batch in memory
        windows = tuple(window.clone() for window in windows)
    pieces = [loop._finish(each, window) for loop, each, window in zip(loops, inputs, windows, strict=True)]
    full = [loop for loop in loops if len(loop._emitted) == loop.window_frames]
    writing = 0.0
    if full:
        committed = [loop._committed for loop in full if loop._committed is not None]
        writing = _write_history(full, committed, torch.cat([torch.stack(loop._actions, 1) for loop in full]))
        for loop in full:
            loop._begin_cycle()
    for loop in loops:
        loop.chunk += 1
    return [
        Piece(latents=latents, before=before, dit_seconds=sum(seconds) + writing * (loop in full), exact=exact)
        for loop, (latents, before, exact) in zip(loops, pieces, strict=True)
    ]


def batches(loops: Sequence[ClosedLoop[Any]]) -> list[list[int]]:
    """The indices of the loops that can advance together, batch by batch."""
    found: dict[object, list[int]] = {}
    for n, loop in enumerate(loops):
        alone = None if isinstance(loop.model, Stacks) else n
        key = id(loop.model), id(loop.cache), loop.config, loop.history.length, alone
        found.setdefault(key, []).append(n)
    return list(found.values())


@torch.inference_mode()
def _write_history(
    loops: Sequence[ClosedLoop[Any]], committed: Sequence[tuple[Tensor, Tensor]], done_BFA: Tensor | None = None
) -> float:
    """The clean pass, which is the KV update. Returns its seconds."""
    latents, actions = torch.cat([each for each, _ in committed]), torch.cat([each for _, each in committed])
    fields: list[dict[str, Any]] = [{"role": "kv_update"} for _ in loops]
    _, took = _forward(loops, fields, latents, sigma=0.0, action_BFA=actions, write=True, done_BFA=done_BFA)
    for loop, (own, _) in zip(loops, committed, strict=True):
        loop.last = own[:, -1].clone()  # a view would keep the whole window in memory
    return took


def _forward(
    loops: Sequence[ClosedLoop[Any]], fields: Sequence[Mapping[str, Any]], latents: Tensor, **inputs: Any
) -> tuple[Tensor, float]:
    """One pass of the model over all loops. Returns its output and its seconds."""
    first, alone = loops[0], len(loops) == 1
    steps = [{"stream": loop.stream, "chunk": loop.chunk, **each} for loop, each in zip(loops, fields, strict=True)]
    within: AbstractContextManager[Any] = nullcontext()
    if first.cache is not None:
        within = first.cache.step(**steps[0]) if alone else first.cache.step(rows=[Step(**step) for step in steps])
    with within:
        started = perf_counter()
        history = first.history if alone else first.model.stack([loop.history for loop in loops])
        output: Tensor = first.model(latents, history=history, **inputs)
        if output.is_cuda:
            torch.cuda.synchronize(output.device)
        return output, perf_counter() - started

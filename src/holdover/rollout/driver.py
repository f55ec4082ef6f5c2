"""The closed loop: an action comes in, the next piece of video goes out.

*Window cadence* (METHODS.md, section 1): a cycle generates one window once per piece, with the same noise; each
generation takes the newest action and emits one more latent frame, and a clean pass then writes one of those windows
into the KV cache. *Plain cadence*: every generation is a new chunk of one latent frame, committed each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from holdover.engine.attach import Cache
from holdover.world.sampler import denoise, noise_levels
from holdover.world.transformer import WorldModel

Cadence = Literal["window", "plain"]
Commit = Literal["first", "last_full", "emitted"]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How generations follow each other.

    Attributes:
        cadence: ``window`` or ``plain``.
        commit: which latents of a cycle the clean pass writes: the window of its ``first`` generation, of the
            ``last_full`` generation that was computed in full, or the pieces as ``emitted``.
        protected: the generation of a cycle that is announced as committed, hence computed in full by policies with
            KV protection: the ``first`` or the ``last``.
        fresh_noise: draw new noise for every generation, not for every cycle.
        steps: denoising passes per generation.
        shift: timestep shift of their noise levels.
    """

    cadence: Cadence = "window"
    commit: Commit = "first"
    protected: Literal["first", "last"] = "first"
    fresh_noise: bool = False
    steps: int = 4
    shift: float = 5.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("cadence", self.cadence, get_args(Cadence)),
            ("commit", self.commit, get_args(Commit)),
            ("protected", self.protected, ("first", "last")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        noise_levels(self.steps, self.shift)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one generation emits.

    Attributes:
        latents: ``float32 [B, 1, N, P]``.
        dit_seconds: time in the transformer, a KV update that followed included.
        exact: whether every block of it was computed.
    """

    latents: Tensor
    dit_seconds: float
    exact: bool


class ClosedLoop:
    """One stream of a world model, driven action by action.

    Args:
        model: the world model, with or without a cache attached.
        start: clean latents ``[B, F, N, P]`` the video begins with, whole windows; they fill the KV cache.
        start_actions: their normalised actions ``[B, F, A]``.
        config: the cadence.
        seed: of the noise.
        cache: what `holdover.attach` returned for this model, or None to compute everything.
        stream: the name of this stream in the cache.
    """

    def __init__(
        self,
        model: WorldModel,
        start: Tensor,
        start_actions: Tensor,
        *,
        config: LoopConfig | None = None,
        seed: int = 0,
        cache: Cache | None = None,
        stream: str = "default",
    ) -> None:
        window = model.config.window
        if start.shape[1] == 0 or start.shape[1] % window:
            raise ValueError(f"start has {start.shape[1]} latent frames; give a multiple of the window, {window}")
        if start_actions.shape[:2] != start.shape[:2]:
            raise ValueError(f"start_actions {tuple(start_actions.shape)} do not match start {tuple(start.shape)}")
        self.model, self.cache, self.stream = model, cache, stream
        self.config = config or LoopConfig()
        self.sigmas = noise_levels(self.config.steps, self.config.shift)
        self.kv = model.new_cache()
        self.generation = 0
        self._dit_seconds = 0.0
        self._noise: Tensor | None
        self._noise_source = torch.Generator(start.device).manual_seed(seed)
        self._shape = start.shape[0], *start.shape[2:]
        self._device = start.device
        self._begin_cycle()
        chunk = 1 if self.config.cadence == "plain" else window
        for first in range(0, start.shape[1], chunk):
            self._write_kv(start[:, first : first + chunk], start_actions[:, first : first + chunk])

    @property
    def chunk_frames(self) -> int:
        """Latent frames denoised together."""
        return 1 if self.config.cadence == "plain" else self.model.config.window

    @torch.inference_mode()
    def step(self, action: Tensor) -> Piece:
        """Generate the next piece under ``action``, the newest normalised command, ``[B, A]`` or ``[A]``."""
        action = action.to(self._device, torch.float32).expand(self._shape[0], -1)
        self._dit_seconds = 0.0
        position = len(self._emitted)
        if self._noise is None or self.config.fresh_noise:
            draw = (self.config.steps, self._shape[0], self.chunk_frames, *self._shape[1:])
            self._noise = torch.randn(draw, generator=self._noise_source, device=self._device)
        noise = self._noise
        self._actions.append(action)
        actions = torch.stack(self._actions + [action] * (self.chunk_frames - position - 1), 1)
        announced = 0 if self.config.protected == "first" else self.chunk_frames - 1

        def predict(index: int, noisy: Tensor) -> Tensor:
            step = self._cache_step(
                chunk=self.generation,
                index=index,
                num_steps=self.config.steps,
                sigma=self.sigmas[index],
                action=action,
                commits=position == announced,
            )
            return self._forward(step, noisy, sigma=self.sigmas[index], action_BFA=actions, cache=self.kv)

        known = torch.cat([noise[0, :, :0], *self._emitted], 1)
        window = denoise(predict, noise, self.sigmas, known)
        exact = self.cache is None or self.cache.exact(self.stream)
        piece = window[:, position : position + 1].clone()
        self._emitted.append(piece)
        if position == 0 or (self.config.commit == "last_full" and exact):
            self._committed = window, actions
        if len(self._emitted) == self.chunk_frames:
            if self.config.commit == "emitted":
                self._committed = torch.cat(self._emitted, 1), torch.stack(self._actions, 1)
            self._write_kv(*self._committed)
            self._begin_cycle()
        self.generation += 1
        return Piece(latents=piece, dit_seconds=self._dit_seconds, exact=exact)

    def run(self, actions: Tensor) -> Iterator[Piece]:
        """Generate one piece per row of ``actions [T, A]`` (or ``[T, B, A]``)."""
        for action in actions:
            yield self.step(action)

    def _begin_cycle(self) -> None:
        self._emitted: list[Tensor] = []
        self._actions: list[Tensor] = []
        self._noise = None

    @torch.inference_mode()
    def _write_kv(self, latents: Tensor, actions: Tensor) -> None:
        step = self._cache_step(chunk=self.generation, role="kv_update") if self.cache else nullcontext()
        self._forward(step, latents, sigma=0.0, action_BFA=actions, cache=self.kv, write=True)

    def _cache_step(self, **fields: Any) -> AbstractContextManager[Any]:
        return self.cache.step(stream=self.stream, **fields) if self.cache else nullcontext()

    def _forward(self, step: AbstractContextManager[Any], latents: Tensor, **inputs: Any) -> Tensor:
        with step:
            started = perf_counter()
            output: Tensor = self.model(latents, **inputs)
            if output.is_cuda:
                torch.cuda.synchronize(output.device)
            self._dit_seconds += perf_counter() - started
        return output

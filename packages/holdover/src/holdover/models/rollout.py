"""Pipelines of the Self-Forcing family, as they are: where a pass stands follows from its timestep and KV position.

Such a pipeline denoises a chunk in a few passes at one place of the KV cache, from much noise to little, writes it
there in a clean pass, and goes on to the next place.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from holdover.engine.cache import Cache
from holdover.engine.compiled import uncompiled
from holdover.engine.copies import mark, unmark
from holdover.method import Policy
from holdover.models.adapter import Place
from holdover.models.attach import attach
from holdover.models.passes import ENABLED
from holdover.models.registry import find, unwrapped

#: The guidance branches by what the names of their KV caches end with.
BRANCHES = {"pos": "cond", "neg": "uncond"}


def model_of(pipeline: Any) -> nn.Module | None:
    """The model that a pipeline of the family runs; None for any other object."""
    model = unwrapped(getattr(unwrapped(getattr(pipeline, "generator", None)), "model", None))
    adapter = find(model) if isinstance(model, nn.Module) else None
    return None if adapter is None or adapter.place is None else model


@dataclass
class Video:
    """One video: its current chunk, and of each guidance branch how many passes ran and the latest timestep."""

    chunk: int = -1
    start: int = -1
    ran: dict[str, tuple[int, float]] = field(default_factory=dict)


class Rollout:
    """What `holdover.enable` returns for such a pipeline.

    Attributes:
        target: the pipeline.
        cache: what decides in its model.
    """

    def __init__(self, pipeline: Any, policy: Policy | Sequence[Policy], **options: Any) -> None:
        model = model_of(pipeline)
        assert model is not None
        if ENABLED in model.__dict__:
            raise ValueError("the pipeline is enabled already; call disable() of what enable returned first")
        adapter = find(model)
        assert adapter is not None
        self.target, self._model, self._adapter = pipeline, model, adapter
        self._num_steps(0)
        self.cache: Cache = attach(model, policy, **options)
        self._stream = "default"
        self._videos: dict[str, Video] = {}
        self._sigmas: dict[float, float] = {}
        model.__dict__.update({ENABLED: self, "_call_impl": self._stepping(model._call_impl)})
        mark(model, self._clean)

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Passes in this context belong to a video of that name: ``with enabled.stream("a"): pipe.inference(...)``."""
        before, self._stream = self._stream, name
        try:
            yield
        finally:
            self._stream = before

    def disable(self) -> None:
        """Restore the model exactly. Stats and trace of the cache stay. Disabling again does nothing."""
        if self._model.__dict__.get(ENABLED) is not self:
            return
        unmark(self._model, self._clean)
        self._clean(self._model.__dict__)
        self.cache.detach()

    def _clean(self, state: dict[str, Any]) -> None:
        for name in (ENABLED, "_call_impl"):
            state.pop(name, None)

    def _stepping(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The same call of the module, in a step."""

        def call(outside: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self.cache.in_step:
                return outside(run, *args, **kwargs)
            fields, commit = self._place(args, kwargs)
            with self.cache.step(**fields):
                output = outside(run, *args, **kwargs)
            commit()
            return output

        return uncompiled(call)

    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
        """The fields of this pass's step, and what to note once it has ended well."""
        adapter, place = self._adapter, self._where(args, kwargs)
        video = self._videos.setdefault(self._stream, Video())
        branch, num_steps = self._branch(place.cache), self._num_steps(place.start)
        at_place = place.start == video.start
        ran, latest = video.ran.get(branch, (0, math.inf)) if at_place else (0, math.inf)
        fields = {"stream": self._stream, "branch": branch}
        told = adapter.kv_update is not None and adapter.kv_update(self._model, *args, **kwargs)
        if told or place.timestep <= self._context_noise or (ran == num_steps and place.timestep < latest):
            return {**fields, "chunk": max(video.chunk, 0), "role": "kv_update"}, lambda: None
        if not at_place or place.timestep >= latest:
            video, ran = self._next(video, place.start), 0

        def commit() -> None:
            video.ran[branch] = ran + 1, place.timestep
            self._videos[self._stream] = video

        return {
            **fields,
            "chunk": video.chunk,
            "index": ran,
            "num_steps": num_steps,
            "sigma": self._sigma(place.timestep),
            "condition": adapter.steering(self._model, arguments(self._model, args, kwargs)),
        }, commit

    def _where(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place:
        assert self._adapter.place is not None
        place = self._adapter.place(self._model, *args, **kwargs)
        if place is None or place.staggered:
            what = "has no KV cache" if place is None else "is over latent frames at several timesteps"
            raise ValueError(
                f"this pass of {self._adapter.family} {what}, so where it stands is not known; say it: `with "
                f"enabled.cache.step(chunk=n, index=i, num_steps=n): ...`, or call enabled.disable()"
            )
        return place

    def _next(self, video: Video, start: int) -> Video:
        """The next chunk of the video; where its place does not lie beyond the latest, that of another video."""
        self.cache.give_up(video.chunk, self._stream)  # it may have been interrupted
        if start <= video.start:
            self.cache.restart(self._stream)
        return Video(video.chunk + 1, start)

    def _branch(self, kv_cache: object) -> str:
        """The name of a guidance branch, told by the pipeline's name for its KV cache."""
        name = next((name for name, value in vars(self.target).items() if value is kv_cache), "")
        return BRANCHES.get(name.rpartition("_")[2], "")

    def _num_steps(self, start: int) -> int:
        """How many denoising passes a chunk has; in Causal-Forcing the first may have a schedule of its own."""
        for name in (["denoising_step_list_first_chunk"] if start == 0 else []) + ["denoising_step_list"]:
            levels = getattr(self.target, name, None)
            if levels is not None:
                return len(levels)
        steps = getattr(self.target, "sampling_steps", None)
        if not isinstance(steps, int):
            raise ValueError(
                f"{type(self.target).__name__} has neither denoising_step_list nor sampling_steps, so how many passes "
                f"make a chunk is not known; attach to its generator.model, and say where each pass stands"
            )
        return steps

    @property
    def _context_noise(self) -> float:
        """The timestep of the clean pass."""
        return float(getattr(getattr(self.target, "args", None), "context_noise", 0) or 0)

    def _sigma(self, timestep: float) -> float:
        """The noise level that the pipeline takes for a timestep: that of the nearest of its schedule."""
        if timestep not in self._sigmas:
            schedule: Any = getattr(self.target, "scheduler", None)
            sigma = timestep / 1000
            if hasattr(schedule, "sigmas") and hasattr(schedule, "timesteps"):
                nearest = (schedule.timesteps.double() - timestep).abs().argmin()
                sigma = float(schedule.sigmas[nearest])
            self._sigmas[timestep] = sigma
        return self._sigmas[timestep]


def arguments(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; a model of the family hands those of its forward on to another method."""
    function = getattr(model, "_forward_inference", model.forward)
    return {**inspect.signature(function).bind_partial(*args, **kwargs).arguments, **kwargs}

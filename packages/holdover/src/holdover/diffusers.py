"""Caching for diffusers pipelines, with the names that their users expect: `enable` and `disable`.

    import holdover.diffusers

    holdover.diffusers.enable(pipe, holdover.policy("fbcache"))
    video = pipe(prompt)

The pipeline runs unmodified. Where a pass stands is read, in this order, from an open ``cache.step``, from
``transformer.cache_context``, and from the pipeline's scheduler. diffusers itself is not imported.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from holdover.engine import condition as conditions
from holdover.engine.cache import Cache
from holdover.engine.context import StepContext
from holdover.method import Policy
from holdover.models.attach import attach
from holdover.models.registry import adapters, find, unwrapped

#: Instance attribute of a transformer by which `disable` finds what `enable` did.
ENABLED = "_holdover_enabled"

#: Methods of transformers and pipelines that change weights, after which the cache must start anew. Others, such as
#: ``load_lora_weights``, call one of these.
REWEIGHTING = (
    "add_adapter",
    "delete_adapters",
    "disable_adapters",
    "disable_lora",
    "enable_adapters",
    "enable_lora",
    "fuse_lora",
    "load_lora_adapter",
    "set_adapter",
    "set_adapters",
    "unfuse_lora",
    "unload_lora",
)


def enable(target: Any, policy: Policy, **options: Any) -> Enabled:
    """Attach a cache to every transformer of a pipeline, or to one transformer.

    Args:
        target: a diffusers pipeline, or its transformer. A transformer outside of a pipeline must be told its steps:
            ``cache_context`` with ``step_index`` and ``num_inference_steps``, or ``enabled.cache.step(...)``.
        policy: a caching method, such as ``holdover.policy("fbcache")``.
        options: of `holdover.attach`, for every transformer.

    Returns:
        What was enabled. `disable` undoes it.

    Raises:
        ValueError: the target holds no known model, its blocks are offloaded, diffusers' own cache is on, or it is
            enabled already.
    """
    models = _transformers(target)
    for name, model in models.items():
        if ENABLED in model.__dict__:
            raise ValueError(f"{name} is enabled already; call holdover.diffusers.disable(...) first")
        if getattr(model, "is_cache_enabled", False):
            raise ValueError(f"diffusers' own cache is on in {name}; call {name}.disable_cache() first")
    enabled = Enabled(target, {})
    try:
        for name, model in models.items():
            enabled.passes[name] = _Passes(enabled, name, model, attach(model, policy, **options))
    except ValueError:  # all transformers of a pipeline, or none
        enabled.disable()
        raise
    return enabled


def disable(target: Any) -> None:
    """Undo `enable`. Does nothing to a target that is not enabled."""
    for model in _transformers(target).values():
        if ENABLED in model.__dict__:
            model.__dict__[ENABLED].disable()


@dataclass
class Enabled:
    """What `enable` returns.

    Attributes:
        target: the pipeline or transformer.
        passes: what follows the passes of each transformer.
        session: the stream that passes belong to.
    """

    target: Any
    passes: dict[str, _Passes]
    session: str = "default"

    @property
    def caches(self) -> dict[str, Cache]:
        """The cache of each transformer; a pipeline may have more than one."""
        return {name: passes.cache for name, passes in self.passes.items()}

    @property
    def cache(self) -> Cache:
        """The cache of the only transformer, or of the first."""
        return next(iter(self.passes.values())).cache

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Passes in this context belong to another video: ``with enabled.stream("b"): pipe(...)``."""
        before, self.session = self.session, name
        try:
            yield
        finally:
            self.session = before

    def disable(self) -> None:
        """Restore the transformers exactly. Stats and trace of the caches stay."""
        for passes in self.passes.values():
            passes.stop()


def _transformers(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        models = {"transformer": unwrapped(target)}
    else:
        parts = getattr(target, "components", {})
        models = {name: unwrapped(part) for name, part in parts.items() if isinstance(part, nn.Module)}
        models = {name: model for name, model in models.items() if find(model) is not None}
    if not models or (isinstance(target, nn.Module) and find(models["transformer"]) is None):
        known = ", ".join(adapter.model for adapter in adapters())
        raise ValueError(
            f"{type(target).__name__} is or holds none of the known models ({known}); attach to its transformer and "
            f"name the blocks: holdover.attach(transformer, policy, slots=[...])"
        )
    return models


@dataclass
class _Chunk:
    """One denoising from noise to a video, or to a chunk of it.

    ``schedule`` is the scheduler's tensor of timesteps. `set_timesteps` makes a new one for every chunk.
    """

    schedule: Any
    number: int
    branches: list[Any] = field(default_factory=list)
    seen: set[tuple[str, int]] = field(default_factory=set)


class _Passes:
    """Opens a step around every pass of a transformer."""

    def __init__(self, enabled: Enabled, name: str, model: nn.Module, cache: Cache) -> None:
        adapter = find(model)
        assert adapter is not None
        self.cache = cache
        self._enabled, self._name, self._model, self._adapter = enabled, name, model, adapter
        self._signature = inspect.signature(model.forward)
        self._context: tuple[str, dict[str, Any]] | None = None
        self._open: StepContext | None = None
        self._chunks: dict[str, _Chunk] = {}
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        model.__dict__[ENABLED] = enabled
        original = getattr(model, "cache_context", None)
        if original is not None:

            @contextmanager
            def cache_context(name: str, **fields: Any) -> Iterator[None]:
                before, self._context = self._context, (name, fields)
                try:
                    with original(name, **fields):
                        yield
                finally:
                    self._context = before

            model.__dict__["cache_context"] = cache_context
        self._owners = [model] if enabled.target is model else [model, enabled.target]
        for owner, method in itertools.product(self._owners, REWEIGHTING):
            if hasattr(owner, method):
                owner.__dict__[method] = self._forgetting(getattr(owner, method))

    def stop(self) -> None:
        self.cache.detach()
        for handle in self._handles:
            handle.remove()
        for owner, name in itertools.product(self._owners, (ENABLED, "cache_context", *REWEIGHTING)):
            owner.__dict__.pop(name, None)

    def _forgetting(self, change: Callable[..., Any]) -> Callable[..., Any]:
        """The same method, which also resets the cache."""

        @functools.wraps(change)
        def changed(*args: Any, **kwargs: Any) -> Any:
            self.cache.reset()
            return change(*args, **kwargs)

        return changed

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.cache.in_step:
            return
        self._open = self.cache.step(**self._fields(model, args, kwargs))
        self._open.__enter__()

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        opened, self._open = self._open, None
        if opened is not None:  # after a pass that raised, torch calls this hook with no output
            failed = RuntimeError if output is None else None
            opened.__exit__(failed, None, None)

    def _fields(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The fields of this pass's step."""
        adapter, stream = self._adapter, self._enabled.session
        told = {**self._signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        name, context = self._context or ("", {})
        scheduler = getattr(self._enabled.target, "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)
        if adapter.kv_update is not None and adapter.kv_update(model, *args, **kwargs):
            number = self._chunks[stream].number if stream in self._chunks else 0
            return {"chunk": number, "stream": stream, "branch": name, "role": "kv_update"}
        if context.get("step_index") is not None:
            index, num_steps = context["step_index"], context.get("num_inference_steps")
        else:
            index, num_steps = _index(scheduler, schedule, told.get("timestep")), None
        if num_steps is None:
            num_steps = None if schedule is None else len(schedule)
        if index is None or num_steps is None:
            raise ValueError(
                f"where this pass of {self._name} stands is not known; run it in its pipeline, or wrap the call: `with "
                f"{self._name}.cache_context('cond', step_index=i, num_inference_steps=n): ...`, or `with "
                f"enabled.cache.step(chunk=n, index=i, num_steps=n): ...`"
            )
        condition: dict[str, Any] = {key: told[key] for key in adapter.condition if isinstance(told.get(key), Tensor)}
        # The strength of a LoRA for this pass.
        scale = (told.get("attention_kwargs") or {}).get("scale")
        if scale is not None:
            condition["scale"] = scale
        chunk = self._chunk(stream, schedule, name, index)
        branch = name or _branch(chunk, condition)
        if (branch, index) in chunk.seen:
            raise ValueError(
                f"{self._name} ran twice at step {index} under one condition; tell the passes apart: `with "
                f"{self._name}.cache_context('cond'): ...`"
            )
        chunk.seen.add((branch, index))
        sigma = context.get("sigma")
        sigmas = getattr(scheduler, "sigmas", None)
        if sigma is None and sigmas is not None and index < len(sigmas):
            sigma = sigmas[index]
        action = told.get(adapter.action) if adapter.action else None
        return {
            "chunk": chunk.number,
            "index": index,
            "num_steps": num_steps,
            "sigma": sigma,
            "action": action if isinstance(action, Tensor) else None,
            "condition": condition,
            "commits": adapter.autoregressive,
            "stream": stream,
            "branch": branch,
        }

    def _chunk(self, stream: str, schedule: Any, branch: str, index: int) -> _Chunk:
        """The chunk of this pass. A new chunk starts with a new schedule, or without one when the steps begin again."""
        known = self._chunks.get(stream)
        if known is None:
            self._chunks[stream] = _Chunk(schedule, 0)
        elif known.schedule is not schedule or (schedule is None and _again(known, branch, index)):
            self.cache.give_up(known.number, stream)  # two transformers share a schedule, a user may interrupt it
            self._chunks[stream] = _Chunk(schedule, known.number + 1)
        return self._chunks[stream]


def _again(chunk: _Chunk, branch: str, index: int) -> bool:
    return (branch, index) in chunk.seen or any(index < seen for _, seen in chunk.seen)


def _index(scheduler: Any, schedule: Any, timestep: Any) -> int | None:
    """The step of a scheduler: its own count, which begins with its first step, or the position of the timestep."""
    if schedule is None:
        return None
    counted = getattr(scheduler, "step_index", None)
    if counted is not None:
        return int(counted)
    if isinstance(timestep, Tensor):
        value = timestep.flatten()[0]
        if bool((timestep == value).all()):
            places = (schedule.to(value) == value).nonzero().flatten().tolist()
            if places:
                return int(places[0])
        elif not hasattr(scheduler, "step_index"):
            return None
    return 0


def _branch(chunk: _Chunk, condition: Mapping[str, Any]) -> str:
    """The name of an unnamed guidance branch, told by its condition. The first of a chunk is ``""``."""
    for number, known in enumerate(chunk.branches):
        if conditions.same(known, condition):
            return str(number or "")
    chunk.branches.append(conditions.freeze(condition))
    return str(len(chunk.branches) - 1 or "")

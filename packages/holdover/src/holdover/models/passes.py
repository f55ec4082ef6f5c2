"""Around every pass of a transformer of diffusers, a step is opened that says where the pass stands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from holdover.engine import condition as conditions
from holdover.engine.cache import Cache
from holdover.engine.compiled import uncompiled
from holdover.engine.copies import mark, unmark
from holdover.models.adapter import DIFFUSERS
from holdover.models.noise import of_scheduler
from holdover.models.registry import find
from holdover.models.schedule import Chunk, caller, position
from holdover.models.videos import Videos

#: Instance attribute of a transformer by which it is known to be enabled.
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


#: Modules of diffusers whose hooks cache.
CACHES = ("cache", "broadcast")


def refuse_other_cache(name: str, model: nn.Module) -> None:
    """Raises: ValueError: diffusers' own cache is on in a transformer, whichever function has switched it on."""
    for module in model.modules():
        hooks = getattr(getattr(module, DIFFUSERS, None), "hooks", {})
        found = [hook for hook in hooks.values() if any(word in type(hook).__module__ for word in CACHES)]
        if found:
            raise ValueError(
                f"diffusers' own cache is on in {name} ({type(found[0]).__name__}), and two caches would both act; "
                f"call {name}.disable_cache() first"
            )


class Passes:
    """Opens a step around every pass of one transformer.

    It takes the place of the module's ``_call_impl``, which runs hooks and forward: so a pass that fails closes its
    step whatever was raised, and what is noted here of a pass is noted once it has ended well.
    """

    def __init__(self, enabled: Any, videos: Videos, name: str, model: nn.Module, cache: Cache, target: Any) -> None:
        adapter = find(model)
        assert adapter is not None
        self.cache = videos.caches[name] = cache
        self.model, self._name, self._adapter = model, name, adapter
        self._videos, self._target = videos, target
        self._signature = inspect.signature(model.forward)
        self._context: tuple[str, dict[str, Any]] | None = None
        self._compiled = model._compiled_call_impl
        own = {ENABLED: enabled, "_call_impl": self._stepping(model._call_impl), "enable_cache": self._refuse}
        original = getattr(model, "cache_context", None)
        if original is not None:
            own["cache_context"] = self._noting(original)
        own |= {name: self._forgetting(getattr(model, name)) for name in REWEIGHTING if hasattr(model, name)}
        self._own = [name for name in own if hasattr(model, name) or name == ENABLED]
        model.__dict__.update({name: own[name] for name in self._own})
        if self._compiled is not None:
            model._compiled_call_impl = self._stepping(self._compiled)
        mark(model, self._clean)

    def stop(self) -> None:
        """Restore the transformer. Stopping again does nothing."""
        if not self._own:
            return
        unmark(self.model, self._clean)
        self._clean(self.model.__dict__)
        if self._compiled is not None:
            self.model._compiled_call_impl = self._compiled
        self._own = []
        self.cache.detach()

    def _clean(self, state: dict[str, Any]) -> None:
        for name in self._own:
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

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``cache_context``, which also says where the pass stands."""

        @contextmanager
        def cache_context(name: str, **fields: Any) -> Iterator[None]:
            before, self._context = self._context, (name, fields)
            try:
                with original(name, **fields):
                    yield
            finally:
                self._context = before

        return cache_context

    def _forgetting(self, change: Callable[..., Any]) -> Callable[..., Any]:
        """The same method, which also resets the cache."""

        @functools.wraps(change)
        def changed(*args: Any, **kwargs: Any) -> Any:
            self.cache.reset()
            return change(*args, **kwargs)

        return changed

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"Holdover's cache is on in {self._name}, and two caches would both act; call "
            f"holdover.diffusers.disable(...) first"
        )

    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
        """The fields of this pass's step, and what to note once it has ended well."""
        told = {**self._signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        branch, context = self._context or ("", {})
        calling = caller()
        running = calling.pipeline is not None
        scheduler = getattr(calling.pipeline if running else self._target, "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)
        video = self._videos.of(calling.call, autoregressive=self._adapter.autoregressive)
        stream, chunk = self._videos.stream, video.chunk
        if self._adapter.kv_update is not None and self._adapter.kv_update(self.model, *args, **kwargs):
            number = chunk.number if chunk is not None else video.next
            return {"chunk": number, "stream": stream, "branch": branch, "role": "kv_update"}, lambda: None
        if chunk is not None and chunk.schedule is not schedule:
            chunk = None
        index, num_steps = self._index(context, scheduler, schedule, told, chunk, running)
        if chunk is not None and self._begins_again(chunk, branch, index, num_steps):
            chunk = None
        if chunk is None:
            if video.chunk is not None:
                self._videos.free(video.chunk)  # it may have been interrupted
            refuse_other_cache(self._name, self.model)
            chunk = Chunk(video.next, schedule, timestep=conditions.freeze(told.get("timestep")))
        chunk = chunk.copy()
        if chunk.first.setdefault(self._name, index) == index > chunk.latest >= 0:
            self._videos.free(chunk, besides=self._name)  # another transformer ran the steps before
        condition = self._adapter.steering(self.model, told)
        branch = branch or chunk.branch(self._name, condition)
        branch = self._told_apart(chunk, branch, index, running)
        self._videos.require_guide(branch)
        chunk.seen.add((self._name, branch, index))

        def commit() -> None:
            video.chunk = chunk
            if chunk.is_over(num_steps):
                self._videos.free(chunk)

        sigma = context.get("sigma")
        if sigma is None:
            sigma = of_scheduler(scheduler, index, self._adapter.prediction)
        action = told.get(self._adapter.action) if self._adapter.action else None
        return {
            "chunk": chunk.number,
            "index": index,
            "num_steps": num_steps,
            "first": chunk.first[self._name],
            "sigma": sigma,
            "action": action if isinstance(action, Tensor) else None,
            "condition": condition,
            "commits": self._adapter.autoregressive,
            "stream": stream,
            "branch": branch,
        }, commit

    def _index(
        self,
        context: Mapping[str, Any],
        scheduler: Any,
        schedule: Any,
        told: Mapping[str, Any],
        chunk: Chunk | None,
        running: bool,
    ) -> tuple[int, int]:
        """The pass's index, and the number of steps."""
        if context.get("step_index") is not None:
            index, num_steps = context["step_index"], context.get("num_inference_steps")
        else:
            index, num_steps = position(scheduler, told.get("timestep"), chunk, running=running), None
        if num_steps is None:
            num_steps = None if schedule is None else len(schedule)
        if index is None or num_steps is None:
            raise ValueError(
                f"where this pass of {self._name} stands is not known; run it in its pipeline, or wrap the call: `with "
                f"{self._name}.cache_context('cond', step_index=i, num_inference_steps=n): ...`, or `with "
                f"enabled.cache.step(chunk=n, index=i, num_steps=n): ...`"
            )
        return index, num_steps

    def _begins_again(self, chunk: Chunk, branch: str, index: int, num_steps: int) -> bool:
        """Whether one schedule serves another chunk."""
        ran = bool(branch) and (self._name, branch, index) in chunk.seen
        return index < chunk.latest or (ran and (chunk.schedule is None or chunk.is_over(num_steps)))

    def _told_apart(self, chunk: Chunk, branch: str, index: int, running: bool) -> str:
        """The branch's name; where a pipeline runs one twice in a step, such as for equal prompts, another one."""
        if (self._name, branch, index) not in chunk.seen:
            return branch
        if not running:
            raise ValueError(
                f"{self._name} ran twice at step {index} under one condition; tell the passes apart: `with "
                f"{self._name}.cache_context('cond'): ...`"
            )
        times = 2
        while (self._name, f"{branch}#{times}", index) in chunk.seen:
            times += 1
        return f"{branch}#{times}"

"""Caching for diffusers pipelines, with the names that their users expect: `enable` and `disable`.

    import holdover.diffusers

    holdover.diffusers.enable(pipe, holdover.policy("fbcache"))
    video = pipe(prompt)

The pipeline runs unmodified. Where a pass stands is read, in this order, from an open ``cache.step``, from
``transformer.cache_context``, and from the scheduler of the pipeline that runs it. Every call of a pipeline is a video
of its own; in `Enabled.stream`, calls go on with one. diffusers itself is not imported.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from holdover.engine.cache import Cache
from holdover.engine.copies import mark, unmark
from holdover.method import Policy
from holdover.models.attach import attach
from holdover.models.passes import ENABLED, REWEIGHTING, Passes, refuse_other_cache
from holdover.models.registry import adapters, find, unwrapped
from holdover.models.videos import Videos

#: Methods of a pipeline that begin its calls: each looks whether its transformers are still those that were enabled.
BEGINNING = ("check_inputs", "progress_bar")

#: The method of SkyReels-V2's pipelines that lays out at which step each latent frame stands.
LAYING_OUT = "generate_timestep_matrix"


def enable(target: Any, policy: Policy | Sequence[Policy], **options: Any) -> Enabled:
    """Attach a cache to every transformer of a pipeline, or to one transformer.

    Args:
        target: a diffusers pipeline, or its transformer. A transformer outside of a pipeline must be told its steps:
            ``cache_context`` with ``step_index`` and ``num_inference_steps``, or ``enabled.cache.step(...)``.
        policy: a caching method, such as ``holdover.policy("fbcache")``, or a list of them, as for `holdover.attach`.
        options: of `holdover.attach`, for every transformer.

    Returns:
        What was enabled. `disable` undoes it.

    Raises:
        ValueError: the target holds no known model, its blocks are offloaded, diffusers' own cache is on, it is
            enabled already, or nothing tells when a call of it begins.
    """
    models = _transformers(target)
    if not isinstance(target, nn.Module) and not any(hasattr(target, name) for name in BEGINNING):
        raise ValueError(
            f"{type(target).__name__} has none of {', '.join(BEGINNING)}, so another transformer put into it would not "
            f"be noticed; enable the transformer itself: holdover.diffusers.enable(pipe.{next(iter(models))}, policy)"
        )
    for name, model in models.items():
        if ENABLED in model.__dict__:
            raise ValueError(f"{name} is enabled already; call holdover.diffusers.disable(...) first")
        refuse_other_cache(name, model)
    enabled = Enabled(target, [policy] if isinstance(policy, Policy) else policy)
    try:
        for name, model in models.items():
            enabled.add(name, model, attach(model, policy, **options))
    except ValueError:  # all transformers of a pipeline, or none
        enabled.disable()
        raise
    return enabled


def disable(target: Any) -> None:
    """Undo `enable`. Does nothing to a target that is not enabled."""
    for model in _transformers(target).values():
        if ENABLED in model.__dict__:
            model.__dict__[ENABLED].disable()


class Enabled:
    """What `enable` returns.

    Attributes:
        target: the pipeline or transformer.
        passes: what follows the passes of each transformer.
    """

    def __init__(self, target: Any, policies: Sequence[Policy]) -> None:
        self.target = target
        self.passes: dict[str, Passes] = {}
        self._videos = Videos(policies)
        self._replaced: tuple[str, ...] = ()  # attributes of the pipeline
        if not isinstance(target, nn.Module):
            self._take_part()

    def add(self, name: str, model: nn.Module, cache: Cache) -> None:
        """Follow the passes of a transformer."""
        self.passes[name] = Passes(self, self._videos, name, model, cache, self.target)

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
        """Calls in this context go on with one video, a chunk each: ``with enabled.stream("a"): pipe(...)``.

        ``enabled.cache.reset("a")`` ends it.
        """
        before, self._videos.session = self._videos.session, name
        try:
            yield
        finally:
            self._videos.session = before

    def disable(self) -> None:
        """Restore the transformers exactly. Stats and trace of the caches stay."""
        for passes in self.passes.values():
            passes.stop()
        if self._replaced:
            unmark(self.target, self._clean)
            self._clean(vars(self.target))
            self._replaced = ()

    def _take_part(self) -> None:
        """Replace methods of the pipeline by those that also do what a cache needs."""
        own = {name: self._looking(getattr(self.target, name)) for name in BEGINNING if hasattr(self.target, name)}
        own |= {
            name: self._forgetting(getattr(self.target, name)) for name in REWEIGHTING if hasattr(self.target, name)
        }
        if hasattr(self.target, LAYING_OUT):
            own[LAYING_OUT] = self._synchronous(getattr(self.target, LAYING_OUT))
        if own:
            self._replaced = tuple(own)
            vars(self.target).update(own)
            mark(self.target, self._clean)

    def _clean(self, state: dict[str, Any]) -> None:
        for name in self._replaced:
            state.pop(name, None)

    def _looking(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The same method, once it is clear that the transformers are those that were enabled."""

        @functools.wraps(method)
        def looked(*args: Any, **kwargs: Any) -> Any:
            for name, passes in self.passes.items():
                if unwrapped(getattr(self.target, name, None)) is not passes.model:
                    raise ValueError(
                        f"{name} of the pipeline is another one than was enabled, so nothing would be cached; call "
                        f"enabled.disable(), then holdover.diffusers.enable(pipe, policy) again"
                    )
            return method(*args, **kwargs)

        return looked

    def _synchronous(self, lay_out: Callable[..., Any]) -> Callable[..., Any]:
        """The same method, where all frames of a pass stand at one step."""

        @functools.wraps(lay_out)
        def laid_out(*args: Any, **kwargs: Any) -> Any:
            ar_step = inspect.signature(lay_out).bind(*args, **kwargs).arguments.get("ar_step", 0)
            if ar_step:
                raise ValueError(
                    f"ar_step={ar_step}: frames of a pass would stand at several steps of the schedule, and a cache "
                    f"needs one step per pass; call the pipeline with ar_step=0, or disable the cache"
                )
            return lay_out(*args, **kwargs)

        return laid_out

    def _forgetting(self, change: Callable[..., Any]) -> Callable[..., Any]:
        """The same method, which also resets the caches."""

        @functools.wraps(change)
        def changed(*args: Any, **kwargs: Any) -> Any:
            for cache in self.caches.values():
                cache.reset()
            return change(*args, **kwargs)

        return changed


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

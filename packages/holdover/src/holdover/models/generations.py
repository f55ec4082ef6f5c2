"""FlashDreams' generations: what its `DiffusionModel.generate` makes is a chunk, its scheduler's calls are the passes.

`finalize` writes the KV cache, with all its forwards. A rollout cache is a stream. FlashDreams is not imported.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from holdover.engine.cache import Cache
from holdover.engine.compiled import uncompiled
from holdover.engine.copies import Cleaner, mark, unmark
from holdover.method import Policy
from holdover.models.attach import attach
from holdover.models.flashdreams import WHOLE, Schedule, branch_of, diffusion_of, grid, plain, ranks, refuse_graphs
from holdover.models.passes import ENABLED
from holdover.models.registry import find, unwrapped

#: The name of the cache of policies of the whole model.
MODEL = "transformer"


@dataclass
class Rollout:
    """A rollout cache: the name of its stream, its latest chunk and that chunk's index in FlashDreams."""

    name: str
    alive: object
    chunk: int = -1
    index: int = -1


@dataclass
class Generation:
    """A chunk that is being made or finalized: the fields of its current step, the index of the first pass of each
    network, and whether any pass ended well.
    """

    cache: Any
    fields: dict[str, Any]
    condition: Any = None
    index: int = -1
    first: dict[str, int] = field(default_factory=dict)
    ran: bool = False


class Generations:
    """What `holdover.enable` returns for a pipeline or diffusion model of FlashDreams.

    Attributes:
        target: the pipeline or diffusion model.
        caches: that of the policy of the whole model, ``"transformer"``, and that of each network.
    """

    def __init__(self, target: Any, policy: Policy | Sequence[Policy], **options: Any) -> None:
        diffusion = diffusion_of(target)
        assert diffusion is not None
        if ENABLED in diffusion.__dict__:
            raise ValueError("the diffusion model is enabled already; call disable() of what enable returned first")
        self.target, self._transformer = target, diffusion.transformer
        self._schedule = Schedule(diffusion.scheduler)
        self._rollouts: dict[int, Rollout] = {}
        self._names = 0
        self._ended: list[str] = []
        self._now: Generation | None = None
        self._placed: list[tuple[Any, Cleaner]] = []
        self.caches: dict[str, Cache] = {}
        try:
            self._attach([policy] if isinstance(policy, Policy) else list(policy), options)
        except ValueError:
            self.disable()
            raise
        self._place(
            diffusion, generate=self._generating(diffusion.generate), finalize=self._finalizing(diffusion.finalize)
        )
        self._place(diffusion, **{ENABLED: self})
        self._place(diffusion.scheduler, sample=self._sampling(diffusion.scheduler.sample))

    @property
    def cache(self) -> Cache:
        """The cache of the outermost policy, in its first network."""
        return next(iter(self.caches.values()))

    def stream(self, rollout: Any) -> str:
        """The name of a rollout's stream, for `Cache.stats` and the trace.

        Args:
            rollout: a cache that ``initialize_cache`` or ``initialize_autoregressive_cache`` returned.
        """
        return self._rollout(getattr(rollout, "transformer_cache", rollout)).name

    def end(self, rollout: Any) -> None:
        """Free what is held of a rollout. That happens by itself once nobody refers to its cache any more.

        Call it also where a rollout goes on under another prompt that was written into its cache.
        """
        self._end(id(getattr(rollout, "transformer_cache", rollout)))

    def disable(self) -> None:
        """Restore the model exactly. Stats and traces of the caches stay. Disabling again does nothing."""
        for owner, clean in reversed(self._placed):
            unmark(owner, clean)
            clean(owner.__dict__)
        self._placed.clear()
        for cache in self.caches.values():
            cache.detach()

    def _attach(self, policies: Sequence[Policy], options: dict[str, Any]) -> None:
        options = {"process_group": ranks(self._transformer), **options}
        outer = [policy for policy in policies[:1] if policy.level == "model"]
        inner = policies[len(outer) :]
        if any(policy.level == "model" for policy in inner):
            told = ", ".join(f"{policy.name} ({policy.level})" for policy in policies)
            raise ValueError(f"policies are {told}; give one per level, outermost first: model, block, sublayer")
        if outer and outer[0].guided:
            raise ValueError(
                f"{outer[0].name} tells guidance branches apart, {' and '.join(map(repr, outer[0].guided))}, and "
                f"FlashDreams runs both within one call of its model; take another policy, such as "
                f"holdover.policy('step_hold')"
            )
        if outer:
            own = {name: value for name, value in options.items() if name not in ("slots", "view_groups")}
            self.caches[MODEL] = attach(self._transformer, outer, slots=[WHOLE], **own)
        if not inner and outer:
            return
        refuse_graphs(self._transformer, inner)
        networks = {
            name: unwrapped(network)
            for name, network in self._transformer.named_modules()
            if name.rpartition(".")[2] == "network"
        }
        if not networks:
            raise ValueError(
                f"{type(self._transformer).__name__} has no module 'network', in which FlashDreams' recipes keep their "
                f"blocks; take a policy of the whole model, such as holdover.policy('step_hold')"
            )
        for name, network in networks.items():
            own = dict(options)
            if "slots" not in own and find(network) is not None:
                owner = self._transformer.get_submodule(name.rpartition(".")[0])
                own.setdefault("view_groups", grid(owner))
            self.caches[name] = attach(network, inner, **own)
            self._place(network, _call_impl=self._stepping(name, network._call_impl))

    def _place(self, owner: Any, **own: Any) -> None:
        """Put attributes into an object, until `disable`."""

        def clean(state: dict[str, Any]) -> None:
            for name in own:
                state.pop(name, None)

        owner.__dict__.update(own)
        mark(owner, clean)
        self._placed.append((owner, clean))

    def _generating(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``generate``, which makes a chunk."""

        @functools.wraps(original)
        def generate(autoregressive_index: int, cache: Any, input: Any = None, **more: Any) -> Any:
            rollout, caches = self._rollout(cache), self.caches.values()
            if autoregressive_index <= rollout.index:  # its bookkeeping was reset, and it serves another video
                for each in caches:
                    each.restart(rollout.name)
            now = Generation(cache, {"stream": rollout.name, "chunk": rollout.chunk + 1}, plain(input))
            try:
                with self._during(now):
                    output = original(autoregressive_index=autoregressive_index, cache=cache, input=input, **more)
            finally:
                for each in caches:
                    each.give_up(rollout.chunk + 1, rollout.name)  # some network may have run a part of its passes
                rollout.chunk += now.ran  # the number of a chunk that was interrupted is not given again
            rollout.index = autoregressive_index
            return output

        return generate

    def _finalizing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``finalize``, which writes the KV cache."""

        @functools.wraps(original)
        def finalize(final_state: Any) -> Any:
            rollout = self._rollout(final_state.cache)
            fields = {"stream": rollout.name, "chunk": max(rollout.chunk, 0), "role": "kv_update"}
            with self._during(Generation(final_state.cache, fields)), self._step(MODEL):
                return original(final_state)

        return finalize

    def _sampling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``sample`` of the scheduler, whose calls of the network are the passes of a chunk."""
        signature = inspect.signature(original)

        @functools.wraps(original)
        def sample(*args: Any, **kwargs: Any) -> Any:
            if self._now is None:
                return original(*args, **kwargs)
            told = signature.bind(*args, **kwargs)
            predict_flow = told.arguments["predict_flow"]

            def predict(noisy_latent: Tensor, timestep: Tensor) -> Any:
                self._advance(timestep)
                with self._step(MODEL):
                    return predict_flow(noisy_latent, timestep)

            told.arguments["predict_flow"] = predict
            return original(*told.args, **told.kwargs)

        return sample

    def _stepping(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """The same call of a network, in a step. Guidance branches are told by their KV caches."""

        def call(outside: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            branch = "" if self._now is None else branch_of(self._now.cache, kwargs.get("cache"))
            with self._step(name, branch=branch):
                return outside(run, *args, **kwargs)

        return uncompiled(call)

    def _advance(self, timestep: Tensor) -> None:
        """The next pass of the chunk begins."""
        now = self._now
        assert now is not None
        now.index += 1
        sigma, last = self._schedule.sigma(now.index, timestep), now.index == self._schedule.num_steps - 1
        now.fields = {key: now.fields[key] for key in ("stream", "chunk")}
        if last and getattr(self._transformer.config, "skip_finalize_kv_cache", False):
            now.fields["role"] = "kv_update"  # what this pass writes is never written anew
            return
        more = {"index": now.index, "num_steps": self._schedule.num_steps, "sigma": sigma, "condition": now.condition}
        now.fields |= more

    @contextmanager
    def _step(self, name: str, branch: str = "") -> Iterator[None]:
        """A step of one of the caches, where the pass of the generation in progress stands."""
        cache, now = self.caches.get(name), self._now
        if cache is None or now is None or cache.in_step:
            yield
            return
        fields = {**now.fields, "branch": branch}
        if "index" in fields:
            fields["first"] = now.first.setdefault(name, now.index)
        with cache.step(**fields):
            yield
        now.ran = True

    @contextmanager
    def _during(self, now: Generation) -> Iterator[None]:
        self._free()
        before, self._now = self._now, now
        try:
            yield
        finally:
            self._now = before
            self._free()

    def _rollout(self, cache: Any) -> Rollout:
        key = id(cache)
        if key not in self._rollouts:
            alive = weakref.ref(cache, lambda _: self._end(key))
            self._rollouts[key] = Rollout(f"rollout {self._names}", alive)
            self._names += 1
        return self._rollouts[key]

    def _end(self, key: int) -> None:
        rollout = self._rollouts.pop(key, None)
        if rollout is not None:
            self._ended.append(rollout.name)
            self._free()

    def _free(self) -> None:
        """Forget the rollouts that ended; one may end within a pass, where a cache forgets nothing."""
        if any(cache.in_step for cache in self.caches.values()):
            return
        while self._ended:
            name = self._ended.pop()
            for cache in self.caches.values():
                cache.reset(name)

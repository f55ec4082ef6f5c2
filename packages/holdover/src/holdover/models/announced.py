"""Whether a pass is what it was announced as: a pass that writes the KV cache is no denoising pass.

Some models are told by an argument that they write; others write clean latents, which a timestep of 0 tells, or latents
with a little noise, at a place where denoising is over. This is looked at before the model runs, whatever the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from holdover.engine.cache import Cache
from holdover.engine.copies import mark, unmark
from holdover.models.adapter import Adapter
from holdover.step import Step

FIX = "wrap this pass: `with cache.step(chunk=n, role='kv_update'): model(...)`"


class Seen(NamedTuple):
    """A denoising pass: its step, and its place in the KV cache."""

    step: Step
    start: int
    timestep: float


class Announced:
    """A forward pre-hook on a model."""

    def __init__(self, adapter: Adapter, model: nn.Module, cache: Cache) -> None:
        self._adapter, self._model, self._cache = adapter, model, cache
        self._latest: dict[tuple[str, str], Seen] = {}
        self._handle = model.register_forward_pre_hook(self._look, with_kwargs=True)
        mark(model, self._clean)

    def remove(self) -> None:
        """Look no more."""
        self._handle.remove()
        unmark(self._model, self._clean)

    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        steps = self._cache.open_steps
        if torch.compiler.is_compiling() or not steps or steps[0].role != "denoise":
            return
        adapter = self._adapter
        if adapter.kv_update is not None and adapter.kv_update(model, *args, **kwargs):
            raise ValueError(f"this pass of {adapter.family} writes the KV cache within a denoising step; {FIX}")
        place = None if adapter.place is None else adapter.place(model, *args, **kwargs)
        if place is None:
            return
        if place.timestep <= 0:
            raise ValueError(
                f"this pass of {adapter.family} is at timestep 0, and so writes the KV cache within a denoising step; "
                f"{FIX}"
            )
        if len(steps) == 1:
            self._suspect(steps, Seen(steps[0], place.start, place.timestep))

    def _suspect(self, steps: Sequence[Step], now: Seen) -> None:
        """Raise where a new chunk is announced at the place of one that is over, with less noise than its last pass."""
        key = now.step.stream, now.step.branch
        then = self._latest.get(key)
        if then is not None and then.step.chunk != now.step.chunk and then.start == now.start:
            over = then.step.index == then.step.num_steps - 1
            if over and now.timestep < then.timestep:
                raise ValueError(
                    f"this pass, announced as denoising of chunk {now.step.chunk}, stands where chunk "
                    f"{then.step.chunk} does, whose denoising is complete, at timestep {now.timestep:g} after its last "
                    f"at {then.timestep:g}: it looks as if it writes the KV cache; {FIX}"
                )
        self._latest[key] = now

    def _clean(self, state: dict[str, Any]) -> None:
        for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            state[name] = type(state[name])((n, hook) for n, hook in state[name].items() if n != self._handle.id)

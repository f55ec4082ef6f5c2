"""Which latents a KV update writes: those of a chunk from cache must not get into the KV cache by mistake.

The cache sees what goes into the model and what comes out of it. The latents of a chunk are the output of its last pass
where the model predicts them, or, where it predicts a velocity, ``x - σ·output``. A few values tell them from others.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from holdover.engine.copies import mark, unmark
from holdover.engine.runtime import Runtime
from holdover.step import Step

#: Values that are looked at, the largest relative distance at which they are the same, and how many chunks are kept.
SAMPLES, TOLERANCE, RECENT = 64, 2e-3, 16

_log = logging.getLogger("holdover")


@dataclass(frozen=True)
class Made:
    """A chunk whose last pass has run: samples of what its latents may be, one row each."""

    chunk: int
    candidates: Tensor


class WrittenLatents:
    """Hooks on a model that remember what chunks made, and look at what KV updates write."""

    def __init__(self, model: nn.Module, runtimes: Sequence[Runtime]) -> None:
        self._model, self._streams = model, [runtime.streams for runtime in runtimes]
        self._made: dict[tuple[str, str], list[Made]] = {}
        self._steps: Sequence[Step] = ()  # of the pass in progress, one per row, if one of them is worth a look
        self._x: Tensor | None = None
        self._told = False
        self._handles: list[RemovableHandle] = []
        if any(runtime.policy.predictor is not None for runtime in runtimes):
            self._handles = [
                model.register_forward_pre_hook(self._enter, with_kwargs=True),
                model.register_forward_hook(self._leave),
            ]
            mark(model, self._clean)

    def begin(self, steps: Sequence[Step]) -> None:
        """A pass begins."""
        if self._handles and (steps[0].role == "kv_update" or any(map(_is_last, steps))):
            self._steps = steps

    def end(self) -> None:
        """The pass is over, however it ended."""
        self._steps, self._x = (), None

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            unmark(self._model, self._clean)

    def forget(self, stream: str | None = None) -> None:
        """Forget what a stream made, or all of them."""
        self._made = {key: made for key, made in self._made.items() if stream is not None and key[0] != stream}

    def fork(self, src: str, dst: str) -> None:
        """What a stream made, its fork made too."""
        self._made |= {(dst, branch): list(made) for (stream, branch), made in self._made.items() if stream == src}

    def _clean(self, state: dict[str, Any]) -> None:
        own = {handle.id for handle in self._handles}
        for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks"):
            state[name] = type(state[name])((n, hook) for n, hook in state[name].items() if n not in own)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        steps = self._steps
        if torch.compiler.is_compiling() or not steps:
            return
        self._x = next(_latents([*args, *kwargs.values()]), None)
        if steps[0].role == "kv_update" and self._x is not None:
            self._look(list(zip(steps, _rows(self._x, len(steps)), strict=False)))

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        steps = self._steps
        if torch.compiler.is_compiling() or not steps or steps[0].role != "denoise":
            return
        x, self._x = self._x, None
        y = next(_latents([output]), None)
        if x is None or y is None or x.shape != y.shape:
            return
        count = len(steps)
        for step, x_row, y_row in zip(steps, _rows(x, count), _rows(y, count), strict=False):
            if not _is_last(step):
                continue
            candidates = [_sample(y_row)]
            if isinstance(step.sigma, float):
                candidates.append(_sample(x_row) - step.sigma * candidates[0])
            made = self._made.setdefault((step.stream, step.branch), [])
            made.append(Made(step.chunk, torch.stack(candidates)))
            del made[:-RECENT]

    def _look(self, rows: Sequence[tuple[Step, Tensor]]) -> None:
        """Tell if the latents are those of a chunk from cache that was said not to be committed."""
        known: list[tuple[list[Made], list[Made]]] = []
        distances: list[Tensor] = []
        for step, x in rows:
            made = self._made.pop((step.stream, step.branch), [])
            cached = [each for each in made if self._from_cache(step, each.chunk)]
            if cached:
                written = _sample(x)
                nearest = torch.stack([(each.candidates - written).norm(dim=1).amin() for each in made])
                distances.append(nearest / written.norm().clamp_min(torch.finfo(torch.float32).tiny))
                known.append((made, cached))
        if not known:
            return
        told = iter(torch.cat(distances).tolist())
        for made, cached in known:
            self._tell(made, cached, [next(told) for _ in made])

    def _tell(self, made: list[Made], cached: list[Made], distances: list[float]) -> None:
        nearest = min(range(len(made)), key=distances.__getitem__)
        if distances[nearest] <= TOLERANCE:
            if made[nearest] in cached:
                warnings.warn(
                    f"the KV update writes the latents of chunk {made[nearest].chunk}, which came from cache with "
                    f"commits=False; keep the latents of a chunk that ran with commits=True and write those",
                    stacklevel=2,
                )
        elif not self._told and len(cached) < len(made):  # else the cycle began elsewhere: in a fork, or a snapshot
            self._told = True
            _log.warning(
                "chunks %s since the last KV update came from cache, and which latents this one writes cannot be told: "
                "write those of a chunk that ran with commits=True",
                ", ".join(str(each.chunk) for each in cached),
            )

    def _from_cache(self, step: Step, chunk: int) -> bool:
        """Whether anything of an uncommitted chunk was reused."""
        for streams in self._streams:
            state = streams[step.stream].chunks.get(chunk) if step.stream in streams else None
            run = state.runs.get(step.branch) if state else None
            if state is not None and run is not None and not (state.commits or run.exact):
                return True
        return False


def _latents(values: Sequence[Any]) -> Iterator[Tensor]:
    """Tensors that latents may be, among arguments and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.dim() >= 3:
                yield value
        elif isinstance(value, list | tuple):
            yield from _latents(value)
        elif isinstance(getattr(value, "sample", None), Tensor):
            yield value.sample


def _sample(x: Tensor) -> Tensor:
    """Some values, spread over the tensor, float32."""
    flat = x.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float()


def _rows(x: Tensor, count: int) -> Sequence[Tensor]:
    """The latents of each row of the batch; none where it has other rows than steps."""
    if count == 1:
        return [x]
    return list(x) if len(x) == count else []


def _is_last(step: Step) -> bool:
    """Whether a denoising pass is its chunk's last."""
    return step.index == step.num_steps - 1

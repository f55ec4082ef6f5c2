"""Running a user's own loop on a model, with and without a cache, and timing its passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from holdover.decision import Stats
from holdover.engine.cache import Cache
from holdover.factories import named
from holdover.method import Policy
from holdover.models.attach import attach
from holdover.step import Role, Step

#: Runs some chunks, every pass of the model within ``with cache.step(...)``, and returns what it made: latents or
#: frames. It starts anew at each call.
Loop = Callable[[Cache], object]


def from_factory(path: str) -> tuple[nn.Module, Loop]:
    """The model and the loop that the function ``package.module:function`` returns.

    Raises:
        ValueError: the path names no function, or the function returns something else.
    """
    made = named(path)()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
        raise ValueError(f"{path!r} returned {type(made).__name__}; return a model and a function of the cache")
    return made


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of the model. ``seconds`` include what the cache does around it."""

    role: Role
    stream: str
    chunk: int
    index: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a loop.

    Attributes:
        passes: in the order in which they ran.
        output: the tensors that the loop returned.
        stats: of the cache; None without one.
        bytes_held: the most that the cache held after a pass.
    """

    passes: Sequence[Pass]
    output: tuple[Tensor, ...]
    stats: Stats | None
    bytes_held: int

    @property
    def seconds(self) -> float:
        """Of all passes."""
        return sum(each.seconds for each in self.passes)


@torch.no_grad()
def run(model: nn.Module, loop: Loop, policy: Policy | None = None) -> Run:
    """Run a loop once: without a cache, or with one attached that follows ``policy``."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if policy is None:
        clock = _Clock(_NoCache(), device)
        output = loop(cast(Cache, clock))
        return Run(passes=clock.passes, output=tuple(_tensors(output)), stats=None, bytes_held=0)
    with attach(model, policy) as cache:
        clock = _Clock(cache, device)
        output = loop(cast(Cache, clock))
    return Run(passes=clock.passes, output=tuple(_tensors(output)), stats=cache.stats(), bytes_held=clock.bytes_held)


def relative_error(output: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """``|output - reference| / |reference|`` in L2, all tensors together.

    Raises:
        ValueError: the loops returned no tensors, or tensors of different shapes.
    """
    if not reference:
        raise ValueError("the loop returned no tensor; return the latents or frames that it made")
    shapes = [[tuple(tensor.shape) for tensor in of] for of in (output, reference)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the loop returned shapes {shapes[0]}, and {shapes[1]} without a cache; return the same ones")
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(output, reference, strict=True))
    size = sum(float(tensor.double().square().sum()) for tensor in reference)
    return (difference / size) ** 0.5 if size else (0.0 if difference == 0 else float("inf"))


class _NoCache:
    """Stands in for a cache where none is attached."""

    nbytes = 0

    def step(self, **fields: Any) -> nullcontext[None]:
        return nullcontext()

    def exact(self, stream: str = "default", branch: str = "") -> bool:
        return True

    def reset(self, stream: str | None = None) -> None:
        """Nothing is held."""

    def give_up(self, chunk: int, stream: str = "default") -> None:
        """Nothing is held."""


class _Clock:
    """A cache whose steps are timed."""

    def __init__(self, cache: Any, device: torch.device) -> None:
        self.passes: list[Pass] = []
        self.bytes_held = 0
        self._cache, self._device = cache, device

    @contextmanager
    def step(self, **fields: Any) -> Iterator[None]:
        started = self._now()
        with self._cache.step(**fields):
            yield
        seconds = self._now() - started
        self.bytes_held = max(self.bytes_held, self._cache.nbytes)
        step = fields["rows"][0] if "rows" in fields else Step(**fields)
        self.passes.append(
            Pass(role=step.role, stream=step.stream, chunk=step.chunk, index=step.index, seconds=seconds)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return perf_counter()


def _tensors(made: object) -> Iterator[Tensor]:
    """The tensors in what a loop returned: a tensor, an array, or sequences and mappings of them."""
    if isinstance(made, Tensor):
        yield made.detach().clone()
    elif isinstance(made, np.ndarray):
        yield torch.from_numpy(made.copy())
    elif isinstance(made, Mapping):
        for value in made.values():
            yield from _tensors(value)
    elif isinstance(made, Sequence) and not isinstance(made, str):
        for value in made:
            yield from _tensors(value)

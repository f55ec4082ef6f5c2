"""What a cache does besides the model's own work, counted: the same on every machine, whatever the clock says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from holdover.engine.blocks import Block
from holdover.method import Policy
from holdover.models.attach import attach
from holdover.tune.loop import Loop, Run, run

#: Operators whose result, or its shape, the host waits for.
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}
#: Operators that launch nothing: they only look at a tensor in another way.
VIEWS = {"detach", "lift_fresh", "alias"}
#: Methods that read a tensor's memory and go by no operator where it is the host's.
READING = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one run of a loop under a policy, beyond what the model and the loop do without it.

    Attributes:
        passes: how many there were.
        syncs: how often the host waits for a number from the device.
        launches: operators that compute or copy something, outside of the blocks.
        bytes_held: the most that the cache held after a pass.
    """

    passes: int
    syncs: int
    launches: int
    bytes_held: int


def count(model: nn.Module, loop: Loop, policy: Policy) -> Counts:
    """Run a loop without a cache and with one, and count what the cache adds.

    What runs within a compiled graph is not seen.

    Args:
        model: the model.
        loop: the same passes each time it is called.
        policy: the policy.
    """
    with attach(model, policy) as cache:
        blocks = [block for runtime in cache._runtimes for block in runtime.blocks]
    without, _ = _counted(model, loop, None, blocks)
    within, result = _counted(model, loop, policy, blocks)
    return Counts(
        passes=len(result.passes),
        syncs=within.syncs - without.syncs,
        launches=within.launches - without.launches,
        bytes_held=result.bytes_held,
    )


class _Counter(TorchDispatchMode):
    """Counts outside of blocks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside = self.syncs = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.inside:
            waits = name in WAITING or (name in ("_to_copy", "copy_") and _comes_to_host(args, output))
            self.syncs += waits or (name in ("index", "index_put_") and _is_mask(args[1]))
            self.launches += not (func.is_view or name in VIEWS or name in WAITING)
        return output


class _Reads(TorchFunctionMode):
    """Counts what a host reads of its own tensors as if they were a device's."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING and args[0].device.type == "cpu" and not self._counter.inside:
            self._counter.syncs += 1
        return func(*args, **(kwargs or {}))


def _comes_to_host(args: Sequence[Any], output: Any) -> bool:
    source = next((value for value in reversed(args) if isinstance(value, Tensor)), output)
    return bool(source.device.type != "cpu" and output.device.type == "cpu")


def _is_mask(indices: Sequence[Any]) -> bool:
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


def _counted(model: nn.Module, loop: Loop, policy: Policy | None, blocks: Sequence[Block]) -> tuple[_Counter, Run]:
    counter = _Counter()
    with _told_apart(counter, blocks), counter, _Reads(counter):
        return counter, run(model, loop, policy)


@contextmanager
def _told_apart(counter: _Counter, blocks: Sequence[Block]) -> Iterator[None]:
    """While the blocks' own forwards run, the counter is told so."""

    def telling(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            counter.inside += 1
            try:
                return original(*args, **kwargs)
            finally:
                counter.inside -= 1

        return forward

    own = [(block.module, block.slot.method) for block in blocks]
    before = [module.__dict__.get(method) for module, method in own]
    for module, method in own:
        module.__dict__[method] = telling(getattr(module, method))
    try:
        yield
    finally:
        for (module, method), original in zip(own, before, strict=True):
            if original is None:
                del module.__dict__[method]
            else:
                module.__dict__[method] = original

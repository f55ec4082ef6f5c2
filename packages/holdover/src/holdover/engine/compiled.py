"""Keeping `torch.compile` out of the engine, and letting it at the blocks.

A call that a dispatcher takes ends the graph in which it is made. The engine runs uncompiled, whatever function the
user compiled around it, and each block that is computed becomes a graph of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_dynamo = torch._C._dynamo.eval_frame

#: What Dynamo compiles frames with in this thread, None where nothing is compiled.
compiling: Callable[[], Any] = _dynamo.get_eval_frame_callback


def skipped(function: Any, why: str = "") -> Any:
    """The same function, marked: Dynamo neither compiles it nor takes it into a graph, and tells ``why``."""
    from torch._dynamo.decorators import skip

    marked: Any = skip(function)
    marked._torchdynamo_disable_msg = why
    return function


def uncompiled(function: Callable[..., Any], why: str = "") -> Callable[..., Any]:
    """The same function, in which nothing is compiled, whatever calls it.

    Its first argument calls another function, with arguments, as if from outside: what was compiled there stays so.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        backend = _dynamo.set_eval_frame(None)
        try:
            return function(functools.partial(_with, backend), *args, **kwargs)
        finally:
            _dynamo.set_eval_frame(backend)

    return skipped(call, why)  # type: ignore[no-any-return]


def _with(backend: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _dynamo.set_eval_frame(backend)
    try:
        return function(*args, **kwargs)
    finally:
        _dynamo.set_eval_frame(None)


def own_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, in a frame by which Dynamo tells its graphs from those of others of the same code."""

    def compute(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    compute.__code__ = compute.__code__.replace()
    return compute

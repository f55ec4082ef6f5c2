"""The span of time in which the model runs one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import TracebackType

from holdover.engine.passes import Pass


class StepContext:
    """What `Cache.step` returns: it opens a pass per policy, and commits or rolls back all of them together."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], Sequence[Pass]]) -> None:
        self._begin, self._end = begin, end

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        passes, finished = self._end(), False
        try:
            if kind is None:
                for each in passes:
                    each.finish()
                finished = True
        finally:
            if not finished:
                for each in passes:
                    each.roll_back()
        if not finished:
            return
        for outer, inner in pairwise(passes):
            if outer.served is not None:
                inner.served_outside(outer.served)
        for each in passes:
            each.commit()

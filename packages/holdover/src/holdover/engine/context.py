"""The span of time in which the model runs one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import TracebackType

from holdover.engine.passes import Pass
from holdover.step import Step


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


def check_rows(rows: Sequence[Step], fields: Mapping[str, object]) -> None:
    """Raise a ValueError unless these are the steps of a batch, a row each, with no other fields beside them."""
    if fields:
        raise ValueError(f"rows came together with {', '.join(fields)}; put these into each row's Step")
    if not rows:
        raise ValueError("rows is empty; pass one Step per row of the batch")
    if len({step.role for step in rows}) > 1:
        raise ValueError("rows differ in role; a pass either denoises or writes the KV cache")
    names = [(step.stream, step.branch) for step in rows]
    if len(set(names)) < len(names):
        raise ValueError(
            f"rows name {max(names, key=names.count)} twice; a stream and branch has one row in a batch, and chunks "
            f"of one video that are in flight together each take a stream of their own: Step(stream=...)"
        )

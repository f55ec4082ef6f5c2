"""A copy of an attached module is a plain module: it takes nothing of the cache along.

`copy.deepcopy`, `copy.copy`, `pickle` and `torch.save` all ask an object for its ``__getstate__``. An attached module
has one of its own, which leaves out what attaching has put into the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Instance attribute by which an attached module is known: what removes the cache from a copied state.
MARK = "_holdover"

Cleaner = Callable[[dict[str, Any]], None]


def mark(module: Any, cleaner: Cleaner) -> None:
    """From now on, copies of the module's ``__dict__`` go through the cleaner."""
    cleaners: list[Cleaner] = module.__dict__.setdefault(MARK, [])
    cleaners.append(cleaner)
    module.__dict__["__getstate__"] = lambda: _plain_state(module)


def unmark(module: Any, cleaner: Cleaner) -> None:
    """The reverse of `mark`."""
    cleaners: list[Cleaner] = module.__dict__[MARK]
    cleaners.remove(cleaner)
    if not cleaners:
        del module.__dict__[MARK], module.__dict__["__getstate__"]


def _plain_state(module: Any) -> Any:
    kind: Any = type(module)
    state = kind.__getstate__(module)
    if isinstance(state, dict):
        state = dict(state)
        for cleaner in reversed(state.pop(MARK, [])):
            cleaner(state)
        state.pop("__getstate__", None)
    return state

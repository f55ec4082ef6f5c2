"""Finding a block that writes into the lists and dictionaries it is given: a KV cache is often one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

#: How deep containers in containers are looked at.
DEPTH = 3

State = dict[str, tuple[tuple[int, int], ...]]


def containers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> State:
    """By where it is among the arguments, what each list and dictionary holds: identities, and versions of tensors."""
    named = {**{f"argument {n}": value for n, value in enumerate(args)}, **kwargs}
    return {name: tuple(map(_identity, items)) for name, items in _walk(named, DEPTH)}


def written(before: State, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Where a list or dictionary has changed since, None if none has."""
    now = containers(args, kwargs)
    return next((name for name, items in before.items() if now.get(name) != items), None)


def _walk(named: Mapping[str, Any], depth: int) -> Iterator[tuple[str, list[Any]]]:
    for name, value in named.items():
        if isinstance(value, dict):
            inside = {f"{name}[{key!r}]": item for key, item in value.items()}
        elif isinstance(value, list):
            inside = {f"{name}[{n}]": item for n, item in enumerate(value)}
        else:
            continue
        yield name, list(inside.values())
        if depth:
            yield from _walk(inside, depth - 1)


def _identity(item: Any) -> tuple[int, int]:
    return id(item), item._version if isinstance(item, Tensor) and not item.is_inference() else 0

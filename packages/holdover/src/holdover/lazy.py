"""Packages whose names are imported when they are first used (PEP 562), so that importing the package is quick."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attributes(package: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        where: per public name the module that defines it; a name that stands for itself is a module.
    """

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(where[name])
        except ModuleNotFoundError as error:
            from holdover.extras import missing

            raise ModuleNotFoundError(missing(error), name=error.name) from error
        value = module if where[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)  # from now on without this function
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *where})

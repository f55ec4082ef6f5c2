"""Functions that a user names on the command line, as ``package.module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def named(path: str) -> Callable[[], Any]:
    """The function that ``package.module:function`` names; modules are searched in the working directory, too.

    Raises:
        ValueError: the path names no function.
    """
    module_name, _, name = path.partition(":")
    if not name:
        raise ValueError(f"{path!r} names no function; give package.module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    function = getattr(importlib.import_module(module_name), name, None)
    if not callable(function):
        raise ValueError(f"{path!r}: the module {module_name} has no function {name!r}")
    found: Callable[[], Any] = function
    return found

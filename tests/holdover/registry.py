"""Every method's cases, as the modules of the naive twins list them."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from tests.holdover import naive
from tests.holdover.case import Case

_TWINS = [import_module(f"{naive.__name__}.{module.name}") for module in pkgutil.iter_modules(naive.__path__)]
_METHODS = [twin for twin in _TWINS if hasattr(twin, "DEFAULT")]

#: One case per method: its defaults, or what comes nearest to them on the toy.
DEFAULTS: list[Case] = [twin.DEFAULT for twin in _METHODS]

#: Options under which the trigger always computes.
CLOSED: list[Case] = [twin.CLOSED for twin in _METHODS]

#: Every option away from its default.
VARIED: list[Case] = [case for twin in _METHODS for case in twin.VARIED]

"""Policies by name: every module of this package that has a function of its own name is a method."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import holdover.methods as package
from holdover.method import Policy


def policies() -> list[str]:
    """The names that `policy` knows."""
    return sorted(
        name for _, name, is_package in pkgutil.iter_modules(package.__path__) if not is_package and _is(name)
    )


def method(name: str) -> Callable[..., Policy]:
    """The function that makes a policy, by its name.

    Raises:
        ValueError: there is no such policy.
    """
    if name not in policies():
        raise ValueError(f"there is no policy {name!r}{_meant(name, policies())}; holdover.policies() lists them")
    function: Callable[..., Policy] = getattr(import_module(f"{package.__name__}.{name}"), name)
    return function


def presets(name: str) -> Mapping[str, Mapping[str, Any]]:
    """A method's presets: by name, options under which it equals code that its authors released.

    They stand beside the method's function, as ``PRESETS``.

    Raises:
        ValueError: there is no such policy.
    """
    found: Mapping[str, Mapping[str, Any]] = getattr(inspect.getmodule(method(name)), "PRESETS", {})
    return found


def policy(name: str, *, preset: str | None = None, **options: Any) -> Policy:
    """A policy by its name: ``policy("xcache", tau_floor=0.95)`` is ``xcache(tau_floor=0.95)``.

    Args:
        name: of the method.
        preset: one of the method's `presets`. Options that are given take the place of the preset's.
        options: of the method.

    Raises:
        ValueError: there is no such policy, preset or option, or an option is out of range.
    """
    function = method(name)
    known = _options(function)
    if preset is not None:
        if preset not in presets(name):
            listed = ", ".join(presets(name)) or "none"
            raise ValueError(
                f"{name} has no preset {preset!r}{_meant(preset, presets(name))}; its presets are: {listed}"
            )
        options = {**presets(name)[preset], **options}
    for option in options:
        if option not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"{name} has no option {option!r}{_meant(option, known)}; its options are: {listed}")
    return function(**options)


def _is(name: str) -> bool:
    """Whether a module holds a method; the registry itself holds none."""
    return hasattr(import_module(f"{package.__name__}.{name}"), name)


def _options(function: Callable[..., Policy]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    own = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    # xcache_reactive passes what it does not know on to xcache.
    passed_on = len(own) < len(parameters)
    return own + _options(method("xcache")) if passed_on else own


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""

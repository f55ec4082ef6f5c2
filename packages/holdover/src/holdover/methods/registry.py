"""Policies by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from holdover.methods.bwcache import bwcache
from holdover.methods.deepcache import deepcache
from holdover.methods.delta_dit import delta_dit
from holdover.methods.dicache import dicache
from holdover.methods.easycache import easycache
from holdover.methods.fastercache import fastercache
from holdover.methods.fbcache import fbcache
from holdover.methods.fixed_interval import fixed_interval
from holdover.methods.flowcache import flowcache
from holdover.methods.magcache import magcache
from holdover.methods.never import never
from holdover.methods.pab import pab
from holdover.methods.policy import Policy
from holdover.methods.taylorseer import taylorseer
from holdover.methods.teacache import teacache
from holdover.methods.toca import toca
from holdover.methods.worldcache_htc import worldcache_htc
from holdover.methods.worldcache_pcd import worldcache_pcd
from holdover.methods.xcache import xcache
from holdover.methods.xcache_reactive import xcache_reactive

_METHODS: dict[str, Callable[..., Policy]] = {
    method.__name__: method
    for method in (
        never,
        fixed_interval,
        xcache,
        xcache_reactive,
        teacache,
        fbcache,
        dicache,
        worldcache_pcd,
        worldcache_htc,
        taylorseer,
        delta_dit,
        easycache,
        bwcache,
        magcache,
        flowcache,
        fastercache,
        pab,
        toca,
        deepcache,
    )
}


def policies() -> list[str]:
    """The names that `policy` knows."""
    return sorted(_METHODS)


def method(name: str) -> Callable[..., Policy]:
    """The function that makes a policy, by its name.

    Raises:
        ValueError: there is no such policy.
    """
    if name not in _METHODS:
        raise ValueError(f"there is no policy {name!r}{_meant(name, _METHODS)}; holdover.policies() lists them")
    return _METHODS[name]


def policy(name: str, **options: Any) -> Policy:
    """A policy by its name: ``policy("xcache", tau_floor=0.95)`` is ``xcache(tau_floor=0.95)``.

    Raises:
        ValueError: there is no such policy or option, or an option is out of range.
    """
    known = _options(method(name))
    for option in options:
        if option not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"{name} has no option {option!r}{_meant(option, known)}; its options are: {listed}")
    return _METHODS[name](**options)


def _options(method: Callable[..., Policy]) -> list[str]:
    parameters = inspect.signature(method).parameters.values()
    own = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    # xcache_reactive passes what it does not know on to xcache.
    passed_on = len(own) < len(parameters)
    return own + _options(xcache) if passed_on else own


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""

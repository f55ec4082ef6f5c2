"""Every registered policy, its naive twin, and options under which it shows all of its reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import holdover
from tests.naive.fixed_interval import FixedInterval
from tests.naive.never import Never
from tests.naive.xcache import XCache
from tests.naive.xcache_reactive import XCacheReactive
from tests.toy import BLOCKS, GROUPS

TOY_GROUPS = [(group.views, group.height, group.width) for group in GROUPS]


@dataclass(frozen=True)
class Case:
    """A policy with options, and the twin that is to agree with it."""

    name: str
    twin: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)

    def policy(self) -> holdover.Policy:
        return holdover.policy(self.name, **self.options)

    def naive(self) -> Any:
        return self.twin(**self.known, **self.options)

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


def fixed(**options: Any) -> Case:
    return Case("fixed_interval", FixedInterval, options, {"blocks": BLOCKS})


def xcache(**options: Any) -> Case:
    return Case("xcache", XCache, options, {"blocks": BLOCKS, "groups": TOY_GROUPS})


def reactive(**options: Any) -> Case:
    return Case("xcache_reactive", XCacheReactive, options, {"blocks": BLOCKS, "groups": TOY_GROUPS})


#: One case per registered policy, its defaults.
DEFAULTS = [Case("never", Never), fixed(), xcache(), reactive()]

#: Options under which the gate never opens.
CLOSED = [Case("never", Never), fixed(warmup=10**6), xcache(tau_floor=1.5), reactive(tau_floor=1.5)]

#: Every option away from its default.
VARIED = [
    fixed(over="steps", every=2),
    fixed(over="steps", every=3, protection="pass", warmup=0, front_anchors=0),
    fixed(every=2, protection="pass"),
    fixed(every=3, protection="pass", span="all", back_anchors=1),
    fixed(over="steps", every=2, span="all", front_anchors=0),
    xcache(front_anchors=2, back_anchors=1, warmup=3),
    xcache(front_anchors=0, warmup=0, protection="pass", max_staleness=2),
    xcache(tau_floor=0.9, margin=0.00015),
    xcache(tau_dev=0.22, alpha=1.0),
    xcache(step0="full", tokens=5),
    xcache(step0="relaxed", tokens=200, tau_floor=0.9),
    xcache(max_staleness=1),
    reactive(scale=(2.0, 0.3)),
    reactive(scale=0.012, protection="pass"),
]

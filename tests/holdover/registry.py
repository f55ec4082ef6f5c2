"""Every registered policy, its naive twin, and options under which it shows all of its reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import holdover
from tests.holdover.naive.bwcache import BWCache
from tests.holdover.naive.deepcache import DeepCache
from tests.holdover.naive.delta_dit import DeltaDiT
from tests.holdover.naive.dicache import DiCache
from tests.holdover.naive.easycache import EasyCache
from tests.holdover.naive.fastercache import FasterCache
from tests.holdover.naive.fbcache import FBCache
from tests.holdover.naive.fixed_interval import FixedInterval
from tests.holdover.naive.flowcache import FlowCache
from tests.holdover.naive.magcache import MagCache
from tests.holdover.naive.never import Never
from tests.holdover.naive.pab import PAB
from tests.holdover.naive.taylorseer import TaylorSeer
from tests.holdover.naive.teacache import TeaCache
from tests.holdover.naive.toca import ToCa
from tests.holdover.naive.worldcache_htc import WorldCacheHTC
from tests.holdover.naive.worldcache_pcd import WorldCachePCD
from tests.holdover.naive.xcache import XCache
from tests.holdover.naive.xcache_reactive import XCacheReactive
from tests.holdover.toy import BLOCKS, FEW, GROUPS, MANY, StaggeredLoop, ToyLoop

TOY_GROUPS = [(group.views, group.height, group.width) for group in GROUPS]


@dataclass(frozen=True)
class Case:
    """A policy with options, and the twin that is to agree with it."""

    name: str
    twin: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    sigmas: tuple[float, ...] = FEW
    known: dict[str, Any] = field(default_factory=dict)
    branches: tuple[str, ...] = ("",)
    loops: type[ToyLoop] = ToyLoop
    #: How far outputs may be from the twin's, relative and absolute, where the two do not add in the same order.
    tolerance: float = 0.0

    def policy(self) -> holdover.Policy:
        return holdover.policy(self.name, **self.options)

    def loop(self, **fields: Any) -> ToyLoop:
        """What it runs in: methods that look from step to step need more than a few."""
        return self.loops(**{"sigmas": self.sigmas, "branches": self.branches} | fields)

    def naive(self) -> Any:
        return self.twin(**self.known, **self.options)

    @property
    def chunks(self) -> int:
        """Enough for it to show all it does, in a golden trace that can be read."""
        return 20 if self.sigmas is FEW else 6

    def protected(self) -> Case:
        """The same under KV protection, which methods from the world without a KV cache have off."""
        return replace(self, options={**self.options, "protection": "chunk"}) if self.sigmas is MANY else self

    @property
    def id(self) -> str:
        """Name and options, but for calibrated numbers, one per step, and token grids."""
        shown = {key: value for key, value in self.options.items() if key not in ("ratios", "grids")}
        return "-".join([self.name, *(f"{key}={value}" for key, value in shown.items())])


def fixed(**options: Any) -> Case:
    return Case("fixed_interval", FixedInterval, options, known={"blocks": BLOCKS})


def xcache(**options: Any) -> Case:
    return Case("xcache", XCache, options, known={"blocks": BLOCKS, "groups": TOY_GROUPS})


def reactive(**options: Any) -> Case:
    return Case("xcache_reactive", XCacheReactive, options, known={"blocks": BLOCKS, "groups": TOY_GROUPS})


def many(name: str, twin: Callable[..., Any], **options: Any) -> Case:
    """A method for samplers of many steps."""
    return Case(name, twin, options, MANY, {"blocks": BLOCKS})


def pcd(**options: Any) -> Case:
    return Case("worldcache_pcd", WorldCachePCD, options, MANY, {"blocks": BLOCKS, "groups": TOY_GROUPS})


def flow(**options: Any) -> Case:
    """FlowCache is for chunks in flight at staggered noise levels."""
    return replace(many("flowcache", FlowCache, **options), loops=StaggeredLoop)


def faster(**options: Any) -> Case:
    case = many("fastercache", FasterCache, grids=GROUPS, **options)
    return replace(case, branches=("cond", "uncond"), tolerance=1e-5)


def toca(**options: Any) -> Case:
    return replace(many("toca", ToCa, **options), tolerance=1e-5)


#: What calibration gives for a model that keeps to MagCache's law: ratios fall slowly, at the end steeply.
RATIOS = tuple(1 - 0.008 - 0.1 * (n / 23) ** 8 for n in range(24))

#: One case per registered policy, its defaults.
DEFAULTS = [
    Case("never", Never),
    fixed(),
    xcache(),
    reactive(),
    many("teacache", TeaCache),
    many("fbcache", FBCache),
    many("dicache", DiCache),
    pcd(),
    many("worldcache_htc", WorldCacheHTC),
    many("taylorseer", TaylorSeer),
    many("delta_dit", DeltaDiT),
    many("easycache", EasyCache, threshold=0.06),  # of 0.025, the default, a step of the toy is on the very edge
    many("bwcache", BWCache),
    many("magcache", MagCache, ratios=RATIOS),
    flow(threshold=0.1),  # of 0.01, the default, the toy moves more in any step
    faster(),
    many("pab", PAB),
    toca(),
    many("deepcache", DeepCache),
]

#: Options under which the gate never opens.
CLOSED = [
    Case("never", Never),
    fixed(warmup=10**6),
    xcache(tau_floor=1.5),
    reactive(tau_floor=1.5),
    many("teacache", TeaCache, threshold=0.0),
    many("fbcache", FBCache, threshold=0.0),
    many("dicache", DiCache, threshold=0.0),
    pcd(threshold=0.0),
    many("worldcache_htc", WorldCacheHTC, eta=0.0),
    many("taylorseer", TaylorSeer, retain=1.0),
    many("delta_dit", DeltaDiT, retain=1.0),
    many("easycache", EasyCache, threshold=0.0),
    many("bwcache", BWCache, threshold=0.0),
    many("magcache", MagCache, ratios=RATIOS, threshold=0.0),
    flow(threshold=0.0),
    faster(retain=1.0),
    many("pab", PAB, start=1.0, stop=1.0),
    toca(retain=1.0),
    many("deepcache", DeepCache, retain=1.0),
]

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
    many("teacache", TeaCache, threshold=0.3, protection="chunk", polynomial=(2.0, 0.5, 0.001)),
    many("fbcache", FBCache, threshold=0.2, protection="chunk"),
    many("dicache", DiCache, threshold=0.3, probe=2, retain=1, protection="chunk"),
    pcd(threshold=0.2, probe=1, beta_s=0.5, alpha=0.5, beta_d="code", gamma=(0.2, 1.8), retain=1, last=True),
    pcd(threshold=0.3, swd=False, ats=False, retain=0.1, protection="chunk"),
    pcd(probe=1, swd=False, cfc=False, ats=False, ofa=False),
    pcd(cfc=False, ofa=False),
    many("worldcache_htc", WorldCacheHTC, chaotic=0.7, n_max=6, eta=3.33, retain=5),
    many("worldcache_htc", WorldCacheHTC, drift_reduction="all", retain=0, stable=0.2, protection="chunk"),
    many("worldcache_htc", WorldCacheHTC, n_max=5, retain=0.2, relative_epsilon=0.1, pinned=48, modalities=(96, 96)),
    many("worldcache_htc", WorldCacheHTC, eta=0.02, pinned=(0, 7, 100)),
    many("taylorseer", TaylorSeer, every=3, order=2, span="block", retain=0.15, protection="chunk"),
    many("taylorseer", TaylorSeer, every=4, order=0, retain=2),
    many("taylorseer", TaylorSeer, every=4, order=2),
    many("delta_dit", DeltaDiT, every=3, early=0.3, retain=2, protection="chunk"),
    many("easycache", EasyCache, threshold=0.1, retain=2, protection="chunk"),
    many("easycache", EasyCache, retain=0),
    many("bwcache", BWCache, threshold=0.035, run=3, retain=0.2, protection="chunk"),
    many("bwcache", BWCache, run=0.2),
    many("magcache", MagCache, ratios=RATIOS, threshold=0.2, max_skips=2, retain=1, protection="chunk"),
    many("magcache", MagCache, ratios=(1.02,) * 24, max_skips=9),
    flow(threshold=0.3, retain=0.2, protection="chunk"),
    replace(flow(threshold=0.2, retain=3), loops=ToyLoop),
    faster(every=3, low=0.8, high=1.5, switch=0.7, retain=2, protection="chunk"),
    replace(faster(every=2, branch="a", guide="b"), branches=("b", "a")),
    many("pab", PAB, spatial=1, temporal=3, cross=2, start=0.3, stop=1.0, protection="chunk"),
    many("pab", PAB, start=0.0),
    toca(every=3, fresh=0.3, age=2.0, retain=0.2, protection="chunk"),
    toca(every=6, fresh=0.02, age=0.0),
    many("deepcache", DeepCache, every=2, shallow=0, retain=3, protection="chunk"),
]

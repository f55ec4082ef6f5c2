"""Which methods are measured beside each other, at which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from holdover.method import Policy
from holdover.methods.registry import policy
from holdover_world.loop.closed_loop import Cadence, LoopConfig
from lab.triggers import with_trigger

#: Few steps, and from how many on the settings for many steps apply.
FEW, MANY = LoopConfig.steps, 12

#: Controls over steps, like most methods, hold over what all blocks did.
_CONTROL = {"span": "all", "front_anchors": 0, "warmup": 0}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A method and its options.

    Attributes:
        calibrated: they are completed by what the calibration measured.
        trigger: of WorldCache-HTC, another than its own (`lab.triggers`).
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    trigger: str = ""

    @property
    def name(self) -> str:
        hidden = _CONTROL if self.method == "fixed_interval" else {}
        shown = [f"{name}={value}" for name, value in self.options.items() if name not in hidden]
        shown += ["calibrated"] * self.calibrated + [f"trigger={self.trigger}"] * bool(self.trigger)
        return f"{self.method}({', '.join(shown)})"

    @property
    def over(self) -> str:
        """Along which axis it holds over, hence which fixed interval is its control."""
        if self.method == "fixed_interval":
            return str(self.options["over"])
        return "chunks" if self.method.startswith("xcache") else "steps"

    def policy(self, cadence: Cadence, calibration: Mapping[str, Mapping[str, Any]]) -> Policy:
        """In the window cadence committed chunks are protected; in the plain one, where all are, no method could
        do anything then, and the clean pass alone is."""
        measured = calibration[self.method] if self.calibrated else {}
        protected = {} if self.method == "never" else {"protection": "chunk" if cadence == "window" else "pass"}
        made = policy(self.method, **self.options, **measured, **protected)
        return with_trigger(made, self.trigger) if self.trigger else made


def _each(method: str, *settings: Mapping[str, Any], calibrated: bool = False) -> list[Setting]:
    return [Setting(method=method, options=options, calibrated=calibrated) for options in settings]


def _every(*intervals: int) -> list[Setting]:
    return _each("fixed_interval", *({"every": every, "over": "steps", **_CONTROL} for every in intervals))


_OVER_CHUNKS = [
    *_each("fixed_interval", {"every": 2, "over": "chunks"}, {"every": 4, "over": "chunks"}),
    *_each("xcache", {}, {"tau_floor": 0.9}),
    *_each("xcache_reactive", {}),
]

#: The sampler of few steps draws new noise at each, so what enters changes by more than half of itself from step to
#: step, and published thresholds, which are an order of magnitude smaller, would compute everything.
FEW_STEPS = [
    *_each("never", {}),
    *_every(2, 4),
    *_OVER_CHUNKS,
    *_each("teacache", {"threshold": 1.0}, {"threshold": 2.0}),
    *_each("teacache", {"threshold": 0.25}, {"threshold": 0.5}, calibrated=True),
    *_each("fbcache", {"threshold": 0.95}, {"threshold": 1.5}),
    *_each("easycache", {"threshold": 0.4, "retain": 1}),
    *_each("magcache", *({"threshold": threshold, "retain": 1} for threshold in (0.06, 0.3)), calibrated=True),
    *_each("bwcache", {"threshold": 1.0, "run": 1}, {"threshold": 1.0, "run": 2}),
    *_each("taylorseer", *({"every": every, "order": order} for every, order in ((2, 0), (2, 1), (4, 1)))),
    *_each("delta_dit", {"every": 2}, {"every": 4}),
    *_each("flowcache", {"threshold": 1.0}, {"threshold": 3.0}),
    *_each("dicache", *({"threshold": threshold, "retain": 1} for threshold in (1.0, 3.0))),
    *_each("worldcache_pcd", *({"threshold": threshold, "retain": 1} for threshold in (0.5, 1.0, 3.0))),
    *_each("pab", {}, {"spatial": 4, "temporal": 4, "stop": 1.0}),
    *_each("toca", {"every": 2}, {"every": 4}, {"every": 4, "fresh": 0.3}),
]
#: WorldCache-HTC with one schedule and several predictors: its own, tokens held, going straight on, damped.
_PREDICTORS = [
    {"stable": stable, "chaotic": chaotic, "eta": 1e3}
    for stable, chaotic in ((0.3, 0.6), (1.0, 1.0), (0.0, 1.0), (0.0, 0.0))
]
_VOYAGER = {"chaotic": 0.7, "n_max": 6, "retain": 5}
#: And with one predictor and several triggers, at thresholds at which they compute about as much.
_TRIGGERS = [("", 1.0), ("every 3", 1.0), ("difference", 0.01), ("norm", 0.003), ("curvature", 30.0)]
#: Euler's steps draw no noise. Published thresholds stand beside others.
MANY_STEPS = [
    *_each("never", {}),
    *_every(2, 3, 4, 5, 7, 12),
    *_OVER_CHUNKS,
    *_each("teacache", {"threshold": 0.05}, {"threshold": 0.1}, {"threshold": 0.2}),
    *_each("teacache", {"threshold": 0.1}, {"threshold": 0.2}, calibrated=True),
    *_each("fbcache", {"threshold": 0.05}, {"threshold": 0.1}, {"threshold": 0.2}),
    *_each("easycache", {"threshold": 0.025}, {"threshold": 0.1}, {"threshold": 0.2}),
    *_each("magcache", {"threshold": 0.06}, {"threshold": 0.3}, calibrated=True),
    *_each("bwcache", {"threshold": 0.05}, {"threshold": 0.15}),
    *_each("taylorseer", *({"every": every, "order": order} for every, order in ((2, 1), (3, 0), (3, 1), (3, 2)))),
    *_each("delta_dit", {"every": 2}, {"every": 4}),
    *_each("flowcache", {"threshold": 0.01}, {"threshold": 0.05}, {"threshold": 0.2}),
    *_each("dicache", {"threshold": 0.08}, {"threshold": 0.2}),
    *_each("worldcache_pcd", {"threshold": 0.02}, {"threshold": 0.04}, {"threshold": 0.08}),
    *_each("worldcache_pcd", *({"threshold": 0.04, module: False} for module in ("cfc", "swd", "ofa", "ats"))),
    *_each("worldcache_htc", {}, {**_VOYAGER, "eta": 3.33}, *_PREDICTORS),
    *[
        Setting(method="worldcache_htc", options={**_VOYAGER, "eta": eta}, trigger=trigger)
        for trigger, eta in _TRIGGERS
    ],
    *_each("pab", {}),
    *_each("toca", {"every": 3}, {"every": 3, "fresh": 0.3}),
]
LEFT_OUT = {
    "deepcache": "needs a U-Net, whose deep part it holds over; this model is a plain stack of blocks",
    "fastercache": "tells one guidance branch from the other; these runs are without guidance, in one branch",
}
LEFT_OUT_OF_FEW = {"worldcache_htc": "computes three steps and the last before it may predict: at four steps, all"}


def settings(steps: int) -> tuple[list[Setting], dict[str, str]]:
    """What is run at so many steps, and which methods are not, with the reason.

    Raises:
        ValueError: there are no settings for this number of steps.
    """
    if steps == FEW:
        return FEW_STEPS, {**LEFT_OUT, **LEFT_OUT_OF_FEW}
    if steps >= MANY:
        return MANY_STEPS, LEFT_OUT
    raise ValueError(f"steps={steps}: give {FEW}, or {MANY} or more")


def by_cadence(steps: int) -> dict[Cadence, list[Setting]]:
    """Which settings are run under which cadence: at few steps all under both, at many each where it belongs."""
    chosen, _ = settings(steps)
    if steps == FEW:
        return {"window": chosen, "plain": chosen}
    over_chunks = [setting for setting in chosen if setting.over == "chunks"]
    return {"window": over_chunks, "plain": [setting for setting in chosen if setting not in over_chunks]}

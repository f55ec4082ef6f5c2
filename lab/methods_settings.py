"""Which methods are measured beside each other, at which settings.

Among them is WorldCache-HTC with other triggers (the ablation of its trigger, arXiv 2603.06331) and one predictor. The
paper names the alternatives and does not define them; `TRIGGERS` is what the names suggest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from holdover.method import Policy
from holdover.methods.registry import policy
from holdover.methods.worldcache_htc import CurvatureDrift, TokenCurvature
from holdover_world.loop.config import Cadence, LoopConfig

Drift = Callable[[Tensor, Tensor, Tensor], Tensor]


def _size(x_BLC: Tensor) -> Tensor:
    size_BL: Tensor = torch.linalg.vector_norm(x_BLC, dim=-1)
    return size_BL


#: By name, what a chaotic token adds to the drift, given its curvature κ, the token now, and the token when it was last
#: shown: how far it has moved and how much its length has changed, both as a share of its length, or κ alone.
TRIGGERS: Mapping[str, Drift] = {
    "difference": lambda _, now, shown: _size(now - shown) / _size(shown),
    "norm": lambda _, now, shown: (_size(now) - _size(shown)).abs() / _size(shown),
    "curvature": lambda kappa, _, __: kappa,
}


@dataclass(frozen=True, kw_only=True)
class OtherDrift(TokenCurvature):
    """`TokenCurvature` with another of `TRIGGERS`."""

    trigger: str

    def drift(self, kappa_BL: Tensor, now_BLC: Tensor, shown_BLC: Tensor) -> Tensor:
        return TRIGGERS[self.trigger](kappa_BL, now_BLC, shown_BLC)


def with_trigger(htc: Policy, trigger: str) -> Policy:
    """A WorldCache-HTC with another trigger: one of `TRIGGERS`, or ``"every N"``, computing every N-th step."""
    assert isinstance(htc.predictor, TokenCurvature)
    if trigger.startswith("every "):
        every = CurvatureDrift(guard=htc.trigger.guard, eta=float("inf"), n_max=int(trigger.removeprefix("every ")) - 1)
        return replace(htc, trigger=every)
    own = {field.name: getattr(htc.predictor, field.name) for field in fields(htc.predictor)}
    return replace(htc, predictor=OtherDrift(**own, trigger=trigger))


#: Few steps; and the number of steps from which the settings for many apply.
FEW, MANY = LoopConfig.steps, 12

#: Controls over steps reuse the result of all blocks together, as most methods do.
_CONTROL = {"span": "all", "front_anchors": 0, "warmup": 0}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A method and its options.

    Attributes:
        calibrated: whether the calibration completes the options.
        trigger: for WorldCache-HTC, one of `TRIGGERS` or "every N" in place of its own.
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
        """The axis along which it reuses; the fixed interval along this axis is its control."""
        if self.method == "fixed_interval":
            return str(self.options["over"])
        return "chunks" if self.method.startswith("xcache") else "steps"

    def policy(self, cadence: Cadence, calibration: Mapping[str, Mapping[str, Any]]) -> Policy:
        """The policy under a cadence.

        In the window cadence committed chunks are protected. In the plain cadence every chunk is committed, so only the
        clean pass is: with committed chunks protected no method could reuse anything.
        """
        measured = calibration[self.method] if self.calibrated else {}
        protected = {} if self.method == "never" else {"protection": "chunk" if cadence == "window" else "pass"}
        # The model's output is [B, F, N, P]; this method must be told where its channels are.
        layout: dict[str, Any] = {"channels": -1} if self.method == "worldcache_htc" else {}
        made = policy(self.method, **self.options, **measured, **protected, **layout)
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

#: The sampler of few steps draws new noise at each. Inputs change by more than half of themselves from step to step;
#: published thresholds are an order of magnitude smaller and would compute everything.
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
#: WorldCache-HTC with one schedule and several predictors: its own, held tokens, linear extrapolation, damped.
_PREDICTORS = [
    {"stable": stable, "chaotic": chaotic, "eta": 1e3}
    for stable, chaotic in ((0.3, 0.6), (1.0, 1.0), (0.0, 1.0), (0.0, 0.0))
]
_VOYAGER = {"chaotic": 0.7, "n_max": 6, "retain": 5}
#: With one predictor and several triggers, at thresholds at which they compute about as much.
_TRIGGERS = [("", 1.0), ("every 3", 1.0), ("difference", 0.01), ("norm", 0.003), ("curvature", 30.0)]
#: Euler steps draw no noise. Published thresholds stand beside others.
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
    "deepcache": "reuses the deep part of a U-Net; this model is a plain stack of blocks",
    "fastercache": "reuses one guidance branch in the other; these runs have one branch, without guidance",
    "frontier": "computes the frame that will be shown of a window; lab/plans measures it",
    "step_hold": "holds the whole model; lab/plain and lab/plans measure it",
    "light_interaction": "goes by what of the world ahead has been seen; lab/plain measures it",
}
LEFT_OUT_OF_FEW = {"worldcache_htc": "computes the first three steps and the last: at four steps, all"}


def settings(steps: int) -> tuple[list[Setting], dict[str, str]]:
    """The settings at this number of steps, and the methods left out, each with the reason.

    Raises:
        ValueError: there are no settings for this number of steps.
    """
    if steps == FEW:
        return FEW_STEPS, {**LEFT_OUT, **LEFT_OUT_OF_FEW}
    if steps >= MANY:
        return MANY_STEPS, LEFT_OUT
    raise ValueError(f"steps={steps}: give {FEW}, or {MANY} or more")


def by_cadence(steps: int) -> dict[Cadence, list[Setting]]:
    """The settings by cadence: at few steps all under both, at many each under the one that suits its axis."""
    chosen, _ = settings(steps)
    if steps == FEW:
        return {"window": chosen, "plain": chosen}
    over_chunks = [setting for setting in chosen if setting.over == "chunks"]
    return {"window": over_chunks, "plain": [setting for setting in chosen if setting not in over_chunks]}

"""X-Cache that notices a change of the action's size: cosine alone does not see a car brake."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from holdover.method import Call, Policy
from holdover.methods.parts.guards import AnyOf
from holdover.methods.xcache import DualMetric, xcache


def xcache_reactive(*, scale: float | Sequence[float] = 0.05, **options: Any) -> Policy:
    """`xcache`, but a new action recomputes the whole chunk.

    An action is new when ``max_i |a_i - b_i| / scale_i >= 1``, ``b`` being the action of the latest chunk that was
    computed in full. Where the step says what each frame is told (``Step.frame_actions``), every frame is compared.
    This replaces the action's entry in X-Cache's cosine.

    Args:
        scale: change of the action that counts, in its normalised units: one number, or one per dimension.
        options: those of `xcache`.

    Raises:
        ValueError: an option is out of range. Steps without ``action`` raise as well.
    """
    base = xcache(**options)
    assert isinstance(base.trigger, DualMetric)
    assert isinstance(base.trigger.guard, AnyOf)
    new_action = NewAction(scale if isinstance(scale, int | float) else tuple(scale))
    trigger = replace(base.trigger, guard=base.trigger.guard | new_action, action=False)
    return replace(base, name="xcache_reactive", trigger=trigger)


@dataclass(frozen=True)
class NewAction:
    """Computes the chunk whose action moved by its scale or more in any dimension.

    It is compared with the action of the latest chunk that was computed in full, so that small changes add up, and
    one answer holds for the whole chunk. Where the step says what each frame is told, every frame is compared.

    Attributes:
        scale: change that counts, in the action's units: one number, or one per dimension.
    """

    scale: float | tuple[float, ...]

    def __post_init__(self) -> None:
        scales = (self.scale,) if isinstance(self.scale, int | float) else self.scale
        if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
            raise ValueError(
                f"scale={self.scale} is not positive; give the change of an action that counts, such as 0.05"
            )

    def __call__(self, call: Call) -> str | None:
        told, known = call.step.told, call.full_action
        if told is None:
            raise ValueError("this policy decides by the action, and the step has none; pass step(action=...)")
        scales = (self.scale,) * len(told[0]) if isinstance(self.scale, int | float) else self.scale
        if len(scales) != len(told[0]):
            raise ValueError(
                f"scale has {len(scales)} dimensions, the action {len(told[0])}; give one scale per dimension"
            )
        if known is None or len(known) != len(told):
            return "action"
        return "action" if any(map(partial(_moved, scales), told, known)) else None


def _moved(scales: Sequence[float], action: tuple[float, ...], known: tuple[float, ...]) -> bool:
    if len(known) != len(action):
        return True
    return max(abs(a - b) / scale for a, b, scale in zip(action, known, scales, strict=True)) >= 1

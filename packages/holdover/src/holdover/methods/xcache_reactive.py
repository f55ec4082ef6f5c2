"""X-Cache that notices a change of the action's size: cosine alone does not see a car brake."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdover.method import Call, Policy
from holdover.methods.parts.guards import AnyOf
from holdover.methods.xcache import DualMetric, xcache


def xcache_reactive(*, scale: float | Sequence[float] = 0.05, **options: Any) -> Policy:
    """`xcache`, but a new action recomputes the whole chunk.

    An action is new when ``max_i |a_i - b_i| / scale_i >= 1``, ``b`` being the action of the latest chunk that was
    computed in full. This replaces the action's entry in X-Cache's cosine.

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
    one answer holds for the whole chunk.

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
        action = call.step.action_vector
        if action is None:
            raise ValueError("this policy decides by the action, and the step has none; pass step(action=...)")
        scales = (self.scale,) * len(action) if isinstance(self.scale, int | float) else self.scale
        if len(scales) != len(action):
            raise ValueError(
                f"scale has {len(scales)} dimensions, the action {len(action)}; give one scale per dimension"
            )
        known = call.full_action
        if known is None or len(known) != len(action):
            return "action"
        moved = max(abs(a - b) / scale for a, b, scale in zip(action, known, scales, strict=True))
        return "action" if moved >= 1 else None

"""X-Cache that notices a change of the action's size: cosine alone does not see a car brake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from holdover.methods.parts.gates import DualMetric
from holdover.methods.parts.guards import NewAction
from holdover.methods.policy import Policy
from holdover.methods.xcache import xcache


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
    assert isinstance(base.gate, DualMetric)
    new_action = NewAction(scale if isinstance(scale, int | float) else tuple(scale))
    gate = replace(base.gate, action=False)
    return replace(base, name="xcache_reactive", guard=base.guard | new_action, gate=gate)

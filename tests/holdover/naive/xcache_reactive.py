"""X-Cache with the reactive gate of docs/methods.md: a new action recomputes the whole chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.holdover.case import TOY_GROUPS, Case
from tests.holdover.naive.xcache import XCache, cosine, told
from tests.holdover.toy import BLOCKS, PlannedLoop


class XCacheReactive(XCache):
    """``exact_told`` is what the latest chunk in which nothing was reused was told, per branch."""

    def __init__(self, *, scale: Any = 0.05, **options: Any) -> None:
        super().__init__(**options)
        self.scale = scale
        self.exact_told: dict[str, Any] = {}
        self.current: dict[str, dict[str, Any]] = {}

    def runner(self, fields: dict[str, Any], run: Any) -> Any:
        if fields.get("role") == "kv_update":
            return super().runner(fields, run)
        branch = fields["branch"]
        current = self.current.get(branch)
        if current is None or current["chunk"] != fields["chunk"]:
            if current is not None and current["exact"] and current["passes"] == current["num_steps"]:
                self.exact_told[branch] = current["told"]
            current = {"chunk": fields["chunk"], "exact": True, "passes": 0, "told": told(fields)}
            self.current[branch] = current
        before = len(self.decisions)
        output = super().runner(fields, run)
        current["passes"], current["num_steps"] = current["passes"] + 1, fields["num_steps"]
        current["exact"] &= all(decision["computed"] for decision in self.decisions[before:])
        return output

    def forced(self, slot: Any, fields: dict[str, Any]) -> str | None:
        reason = super().forced(slot, fields)
        if reason is not None and reason not in ("condition", "first"):
            return reason
        known = self.exact_told.get(slot[0])
        scales = [self.scale] * len(fields["action"]) if isinstance(self.scale, float) else list(self.scale)
        moved = known is None or any(
            abs(a - b) / scale >= 1
            for now, then in zip(told(fields), known, strict=True)
            for a, b, scale in zip(now, then, scales, strict=True)
        )
        return "action" if moved else reason

    def entries_cosine(self, slot: Any, fields: dict[str, Any], spatial: Any, mean: Any) -> float:
        cosines = [cosine(a, b) for a, b in zip(spatial, self.spatial[slot], strict=True)]
        return min(cosines + [cosine(a, b) for a, b in zip(mean, self.mean[slot], strict=True)])


def case(**options: Any) -> Case:
    return Case(
        "xcache_reactive", XCacheReactive, options, known={"blocks": BLOCKS, "groups": TOY_GROUPS}, tolerance=1e-5
    )


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(tau_floor=1.5)
#: Every option away from its default.
VARIED: list[Case] = [
    case(scale=(2.0, 0.3)),
    case(scale=0.012, protection="pass"),
    replace(case(scale=0.06), loops=PlannedLoop),
]

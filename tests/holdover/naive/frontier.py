"""Frontier, slowly: every block computes all tokens, on inputs of which all but the frame's are old, and only the
frame's outputs are taken."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from tests.holdover.case import Case
from tests.holdover.toy import BLOCKS, PER_FRAME, WINDOW, PlannedLoop, ToyLoop


class Frontier:
    """``given[branch, pass, block]`` are the inputs of attention, of which keys and values are made, as last computed.

    ``residual[branch, pass]`` is what all blocks added when the window was last computed whole, in chunk ``whole``.
    """

    def __init__(self, *, blocks: int, later: str = "never") -> None:
        self.blocks, self.later = blocks, later
        self.given: dict[Any, Any] = {}
        self.residual: dict[Any, Any] = {}
        self.whole: dict[Any, int] = {}
        self.told: dict[Any, list[Any]] = {}
        self.condition: dict[str, Any] = {}
        self.renewed: set[Any] = set()
        self.decisions: list[dict[str, Any]] = []

    def runner(self, fields: dict[str, Any], run: Any) -> Any:
        if fields.get("role") == "kv_update":
            return run(apply=lambda block, x, compute: self.note(block, "kv update", compute(x)))
        branch, chunk = fields["branch"], fields["chunk"]
        if self.condition.setdefault(branch, fields["condition"]) != fields["condition"]:
            self.condition[branch] = fields["condition"]
            self.renewed.add((chunk, branch))
        slot = branch, fields["index"]
        reason, frames = self.reason(slot, fields), range(WINDOW)
        if reason == "reuse":
            frames = self.frames(slot, fields)
        now = fields.get("frame_actions") or [fields["action"]] * WINDOW
        self.told[slot] = [now[f] if f in frames else self.told[slot][f] for f in range(WINDOW)]
        rows, state = slice(frames[0] * PER_FRAME, (frames[-1] + 1) * PER_FRAME), {}

        def apply(block: int, x: Any, compute: Any) -> Any:
            if block == 0:
                state["entered"], state["hidden"] = x, x[:, rows]
            hidden, key = state["hidden"], (*slot, block)
            given = self.given[key] = self.given[key].clone() if reason == "reuse" else compute.modulated(x)
            given[:, rows] = compute.modulated(hidden)
            y = hidden + compute.attention(given)[:, rows]
            state["hidden"] = y + compute.mlp(F.layer_norm(y, y.shape[-1:]))
            scores = {"recomputed": len(frames) / WINDOW} if reason == "reuse" else {}
            if block < self.blocks - 1:
                return self.note(block, reason, x if reason == "reuse" else state["hidden"], scores)
            if reason != "reuse":
                self.residual[slot], self.whole[slot] = state["hidden"] - state["entered"], chunk
            output = state["entered"] + self.residual[slot]
            output[:, rows] = state["hidden"]
            return self.note(block, reason, output, scores)

        return run(apply=apply)

    def reason(self, slot: Any, fields: dict[str, Any]) -> str:
        if fields["commits"]:
            return "kv cycle"
        if fields.get("shown") is None:
            return "needs Step.shown"
        if (fields["chunk"], slot[0]) in self.renewed:
            return "condition"
        if slot not in self.whole:
            return "first"
        return "reuse" if self.whole[slot] >= fields["chunk"] - fields["shown"] else "new window"

    def frames(self, slot: Any, fields: dict[str, Any]) -> range:
        """Those that are computed."""
        shown = fields["shown"]
        now = fields.get("frame_actions") or [fields["action"]] * WINDOW
        changed = any(now[f] != self.told[slot][f] for f in range(shown + 1, WINDOW))
        if self.later == "always" or (self.later == "revised" and changed):
            return range(shown, WINDOW)
        return range(shown, shown + 1)

    def note(self, block: int, reason: str, y: Any, scores: dict[str, float] | None = None) -> Any:
        decision = {"block": block, "computed": reason != "reuse", "reason": reason, "scores": scores or {}}
        self.decisions.append(decision)
        return y


def case(loops: type[ToyLoop] = PlannedLoop, **options: Any) -> Case:
    return Case("frontier", Frontier, options, loops=loops, known={"blocks": BLOCKS}, tolerance=1e-5)


DEFAULT = case()
#: A loop that does not say what a chunk will show: the trigger always computes.
CLOSED = case(ToyLoop, later="always")
#: Every option away from its default.
VARIED: list[Case] = [case(later="revised"), case(later="always")]

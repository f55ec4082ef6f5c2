"""The fixed schedule, slowly: over steps, every N-th pass; over chunks, N chunks after the last time."""

from __future__ import annotations

from typing import Any

from tests.holdover.case import Case
from tests.holdover.toy import BLOCKS


class FixedInterval:
    """``last`` residuals by slot: (branch, block) over steps, (branch, pass, block) over chunks."""

    def __init__(
        self,
        *,
        blocks: int,
        every: int = 4,
        over: str = "chunks",
        span: str = "block",
        front_anchors: int = 1,
        back_anchors: int = 0,
        warmup: int = 1,
        protection: str = "chunk",
    ) -> None:
        self.blocks, self.every, self.over, self.span = blocks, every, over, span
        self.front, self.back, self.warmup, self.protection = front_anchors, back_anchors, warmup, protection
        self.last: dict[Any, Any] = {}
        self.chunks: list[int] = []
        self.condition: dict[str, Any] = {}
        self.renewed: set[Any] = set()
        self.begun: set[Any] = set()
        self.decisions: list[dict[str, Any]] = []

    def runner(self, fields: dict[str, Any], run: Any) -> Any:
        if fields.get("role") == "kv_update":
            return run(apply=lambda block, x, compute: self._note(block, "kv update", compute(x)))
        new = (fields["chunk"], fields["branch"]) not in self.begun
        self.begun.add((fields["chunk"], fields["branch"]))
        if fields["chunk"] not in self.chunks:
            self.chunks.append(fields["chunk"])
        if self.condition.setdefault(fields["branch"], fields["condition"]) != fields["condition"]:
            self.condition[fields["branch"]] = fields["condition"]
            if not (new and self.over == "steps"):  # whose entries serve one chunk
                self.renewed.add((fields["chunk"], fields["branch"]))
        chunk, t = self.chunks.index(fields["chunk"]), fields["index"]
        whole = range(self.front, self.blocks - self.back)
        entered: list[Any] = []
        reused_run: list[bool] = []

        def decide(block: int) -> str:
            slot = self._slot(fields["branch"], t, block)
            known = self.last.get(slot)
            if chunk < self.warmup:
                return "warm-up"
            if fields["commits"] and self.protection == "chunk":
                return "kv cycle"
            if block < self.front or block >= self.blocks - self.back:
                return "anchor"
            if self.over == "steps" and t % self.every == 0:
                return "interval"
            if self.over == "chunks" and known and chunk - known["chunk"] >= self.every:
                return "interval"
            if (fields["chunk"], fields["branch"]) in self.renewed:
                return "condition"
            if known is None or (self.over == "steps" and known["chunk"] != chunk):
                return "first"
            return "reuse"

        def apply(block: int, x: Any, compute: Any) -> Any:
            if self.span == "block" or block not in whole:
                reason = decide(block)
                if reason == "reuse":
                    return self._note(block, reason, x + self.last[self._slot(fields["branch"], t, block)]["r"])
                y = compute(x)
                self.last[self._slot(fields["branch"], t, block)] = {"r": y - x, "chunk": chunk}
                return self._note(block, reason, y)
            # One residual for all blocks between the anchors: the first answers, the others pass on.
            slot = self._slot(fields["branch"], t, whole[0])
            if block == whole[0]:
                entered.append(x)
                reused_run.append(decide(block) == "reuse")
                self.run_reason = decide(block)
                if reused_run[-1]:
                    return self._note(block, "reuse", x + self.last[slot]["r"])
            elif reused_run[-1]:
                return self._note(block, "reuse", x)
            y = compute(x)
            if block == whole[-1]:
                self.last[slot] = {"r": y - entered[-1], "chunk": chunk}
            return self._note(block, self.run_reason, y)

        return run(apply=apply)

    def _slot(self, branch: str, t: int, block: int) -> Any:
        return (branch, block) if self.over == "steps" else (branch, t, block)

    def _note(self, block: int, reason: str, y: Any) -> Any:
        self.decisions.append({"block": block, "computed": reason != "reuse", "reason": reason, "scores": {}})
        return y


def case(**options: Any) -> Case:
    return Case("fixed_interval", FixedInterval, options, known={"blocks": BLOCKS})


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case(warmup=10**6)
#: Every option away from its default.
VARIED: list[Case] = [
    case(over="steps", every=2),
    case(over="steps", every=3, protection="pass", warmup=0, front_anchors=0),
    case(every=2, protection="pass"),
    case(every=3, protection="pass", span="all", back_anchors=1),
    case(over="steps", every=2, span="all", front_anchors=0),
]

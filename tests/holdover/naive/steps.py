"""What all twins of methods that look from step to step share: a memory per guidance branch and chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F

from tests.holdover.toy import KINDS


class StepTwin(ABC):
    """``memory[branch, chunk]`` begins empty; ``decide`` and ``answer`` are the method.

    A pass is answered block by block: ``block(number, x, compute)`` returns what the block gives.
    """

    retain: Any = 0
    computes_last = False
    #: Something is remembered from chunk to chunk.
    lasts = False
    #: Guidance branches, in order, over which passes are counted, if any.
    branches: Any = ()

    def __init__(self, *, blocks: int, protection: str = "pass") -> None:
        self.blocks, self.protection = blocks, protection
        self.memory: dict[tuple[str, int], dict[Any, Any]] = {}
        self.condition: dict[str, Any] = {}
        #: How often a branch's condition had changed: by now, and when a chunk of it began.
        self.changes: dict[str, int] = {}
        self.begun: dict[tuple[str, int], int] = {}
        self.decisions: list[dict[str, Any]] = []
        self.now: dict[str, Any] = {}

    def runner(self, fields: dict[str, Any], run: Any) -> Any:
        if fields.get("role") == "kv_update":
            return run(apply=self.update)
        branch, chunk = fields["branch"], (fields["branch"], fields["chunk"])
        before = self.changes.setdefault(branch, 0)
        if self.condition.setdefault(branch, fields["condition"]) != fields["condition"]:
            self.condition[branch] = fields["condition"]
            self.changes[branch] += 1
        # A chunk may begin under another condition, where nothing of those before it is held.
        self.begun.setdefault(chunk, before if self.lasts else self.changes[branch])
        renewed = self.changes[branch] > self.begun[chunk]
        self.now = {"fields": fields, "memory": self.memory.setdefault(chunk, {}), "renewed": renewed}
        return run(apply=self.block)

    @abstractmethod
    def block(self, number: int, x: Any, compute: Any) -> Any: ...

    def update(self, number: int, x: Any, compute: Any) -> Any:
        """A block of the pass that writes the KV cache."""
        return self.note(number, "kv update", compute(x))

    def forced(self) -> str | None:
        """Why this pass is computed whatever the method thinks."""
        fields, memory = self.now["fields"], self.now["memory"]
        number, passes = self.counted()
        share, more = self.retain if isinstance(self.retain, tuple) else (self.retain, 0)
        each = passes // fields["num_steps"]
        first = each * more + (int(share * passes + 1e-9) if isinstance(share, float) else each * share)
        if self.protection == "chunk" and fields["commits"]:
            return "kv cycle"
        if number < first:
            return "retained"
        if self.computes_last and fields["index"] == fields["num_steps"] - 1:
            return "last step"
        if self.now["renewed"]:
            return "condition"
        return None if memory else "first"

    def counted(self) -> tuple[int, int]:
        """Which of the chunk's passes this is, and how many there are."""
        index, steps, branch = (self.now["fields"][name] for name in ("index", "num_steps", "branch"))
        if not self.branches:
            return index, steps
        return index * len(self.branches) + self.branches.index(branch), steps * len(self.branches)

    def note(self, number: int, reason: str, y: Any, scores: dict[str, float] | None = None) -> Any:
        decision = {"block": number, "computed": reason != "reuse", "reason": reason, "scores": scores or {}}
        self.decisions.append(decision)
        return y


class SublayerTwin(StepTwin):
    """Answers attention and MLP of a block one by one: ``part(slot, kind, x, compute)`` returns what the slot gives."""

    def block(self, number: int, x: Any, compute: Any) -> Any:
        y = x + self.part(2 * number, KINDS[number], compute.modulated(x), compute.attention)
        return y + self.part(2 * number + 1, "mlp", F.layer_norm(y, y.shape[-1:]), compute.mlp)

    def update(self, number: int, x: Any, compute: Any) -> Any:
        self.note(2 * number, "kv update", None)
        return self.note(2 * number + 1, "kv update", compute(x))

    @abstractmethod
    def part(self, slot: int, kind: str, x: Any, compute: Any) -> Any: ...


class TailTwin(StepTwin):
    """Decides once per pass, when ``probe`` blocks have run; the rest is computed, or one residual stands for it."""

    probe = 0

    def block(self, number: int, x: Any, compute: Any) -> Any:
        now = self.now
        if number == 0:
            now["entry"] = x.clone()
        if number < self.probe:
            return self.note(number, "probe", compute(x))
        if number == self.probe:
            now["x"] = x.clone()
            now["reason"], now["scores"] = self.decide(x, compute)
        if now["reason"] == "reuse":
            return self.note(number, "reuse", self.stand_in(x) if number == self.probe else x, now["scores"])
        y = compute(x)
        if number == self.blocks - 1:
            self.learn(y)
        return self.note(number, now["reason"], y, now["scores"])

    @abstractmethod
    def decide(self, x: Any, compute: Any) -> tuple[str, dict[str, float]]: ...

    def stand_in(self, x: Any) -> Any:
        return x + self.now["memory"]["residual"]

    def learn(self, y: Any) -> None:
        self.now["memory"]["residual"] = y - self.now["x"]


def change(now: Any, then: Any) -> float:
    """Relative change in L1."""
    return float((now - then).abs().mean() / then.abs().mean())

"""Computes everything: the baseline that a trace and statistics can be had for."""

from __future__ import annotations

from dataclasses import dataclass

from holdover.method import Call, Policy
from holdover.methods.parts.spans import EachBlock
from holdover.methods.parts.triggers import Open


@dataclass(frozen=True)
class Always:
    """Computes everything."""

    reason: str

    def __call__(self, call: Call) -> str | None:
        return self.reason


def never() -> Policy:
    """A policy that holds nothing and computes every block."""
    return Policy(name="never", spans=EachBlock(), trigger=Open(guard=Always("never")))

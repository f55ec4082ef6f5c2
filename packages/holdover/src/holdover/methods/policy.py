"""A caching method, composed of parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from holdover.engine.contract import Gate, Predictor, Signal
from holdover.engine.slots import Level
from holdover.methods.parts.guards import Guard
from holdover.methods.parts.spans import Spans


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Unless the guard forbids it, the gate decides by the signal whether the predictor stands in for a span.

    Attributes:
        name: of the method.
        spans: which runs of blocks are held over as one.
        guard: forces computation.
        gate: decides where the guard does not.
        signal: what the gate looks at; None if it needs no tensor.
        predictor: stands in for a span; None for a policy that computes everything.
        per_index: each pass index of a chunk has state of its own.
        lifetime: what is held serves the whole ``stream``, or the ``chunk`` in which it was computed; of several
            chunks in flight each keeps its own.
        level: the slots are a model's ``block``s, the ``sublayer``s within these, or the ``model`` as a whole.
        reads_entry: signal or predictor read what entered the pass's first block.
        one_for_all_branches: guidance branches, which keep states of their own, share the first one's decision.
    """

    name: str
    spans: Spans
    guard: Guard
    gate: Gate
    signal: Signal | None = None
    predictor: Predictor | None = None
    per_index: bool = False
    lifetime: Literal["stream", "chunk"] = "stream"
    level: Level = "block"
    reads_entry: bool = False
    one_for_all_branches: bool = False

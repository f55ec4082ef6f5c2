"""What runs beside the model's own computation: the part of a span that is computed, and audits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdover.engine.blocks import Block
from holdover.engine.rows import Rows, put_tokens, take_tokens
from holdover.engine.runtime import Runtime
from holdover.engine.trace import Note
from holdover.engine.transaction import Transaction
from holdover.method import Call


@dataclass(slots=True)
class Side:
    """One computation, which carries its hidden state from block to block; ``tokens`` are those of a part."""

    rows: Sequence[int]
    hidden: Tensor
    tokens: Tensor | None = None
    memory: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)


class Sides:
    """All of one span. ``audited`` are the rows whose prediction is compared with the truth."""

    def __init__(
        self, runtime: Runtime, transactions: Sequence[Transaction], rows: Rows, calls: Sequence[Call]
    ) -> None:
        self._runtime, self._transactions, self._rows, self._calls = runtime, transactions, rows, calls
        self._sides: list[Side] = []
        self._by_count: dict[int, list[int]] = {}  # rows with as many tokens run together
        self.audited: list[int] = []

    def add(self, n: int, *, audited: bool) -> None:
        """A row that is audited, or computes the part that its call names, or both."""
        if audited:
            self.audited.append(n)
        if (tokens := self._calls[n].part) is not None:
            self._by_count.setdefault(tokens.shape[-1], []).append(n)

    def open(self, block: Block, x: Tensor) -> None:
        """Begin with the hidden state that enters the span's first block: parts, then audits."""
        parts = self._rows.split(x)
        for rows in self._by_count.values():
            tokens = self._rows.join([self._rows.tokens(t) for n in rows if (t := self._calls[n].part) is not None])
            self._sides.append(Side(rows, take_tokens(self._rows.join([parts[n] for n in rows]), tokens), tokens))
        if self.audited:
            apart = self._rows.batched and self._runtime.splits(self._calls[0].span)
            rows = self.audited if apart else list(range(len(parts)))
            hidden = self._rows.join([parts[n] for n in rows]) if apart else x
            self._sides.append(Side(rows, hidden if block.overwrites_input is False else hidden.clone()))

    def run(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run a block for each."""
        for side in self._sides:
            own = (args, kwargs)
            if len(side.rows) < len(self._transactions):
                own = block.take(side.rows, args, kwargs)
            own = block.replace(*own, side.hidden)
            if side.tokens is None:
                output = block.compute(*own[0], **own[1])
            else:
                known = [self._transactions[n].open_memory(self._calls[n], block.index) for n in side.rows]
                before = {name: self._rows.join([each[name] for each in known]) for name in known[0]}
                output, after = block.run_part(side.tokens, before, *own)
                if after:
                    side.memory[block.index] = after
            side.hidden, _ = block.split(output)

    def finish(self, predictions: dict[int, Tensor], notes: Sequence[Note], keep: Callable[[int], None]) -> None:
        """Put parts into the predictions, with ``keep`` for each row, and note the errors that audits found."""
        for side in self._sides:
            for at, (n, hidden) in enumerate(zip(side.rows, self._rows.split(side.hidden), strict=True)):
                call, row = self._calls[n], self._transactions[n]
                if call.part is not None and side.tokens is not None:
                    predictions[n] = put_tokens(predictions[n], self._rows.tokens(call.part), hidden)
                    if side.memory:
                        row.update_memory(call, self._rows.memory(at, len(side.rows), side.memory))
                    keep(n)
                elif n in self.audited:
                    norm, truth = torch.linalg.vector_norm, hidden.float()
                    smallest = torch.finfo(torch.float32).tiny
                    error = float(norm(predictions[n].float() - truth) / norm(truth).clamp_min(smallest))
                    row.audit_errors.append(math.inf if math.isnan(error) else error)
                    notes[n].audit = row.audit_errors[-1]

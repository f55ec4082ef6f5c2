"""One span of one pass once it is decided: let the predictor stand in, run what must run, remember."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holdover.decision import REUSE
from holdover.engine.ahead import predict_run
from holdover.engine.blocks import Block
from holdover.engine.decide import Decided
from holdover.engine.rows import Rows
from holdover.engine.runtime import Runtime
from holdover.engine.sides import Sides
from holdover.engine.trace import Note
from holdover.engine.transaction import Transaction
from holdover.method import Call

#: In place of a block's number: any block of the span.
ANY = -1


class SpanRun:
    """A span in progress, or several in a row that are all reused.

    Attributes:
        first, last: the blocks with which it begins and ends.
        notes: per span and row, what the trace will tell.
    """

    _sides: Sides | None = None
    _handed_on = True
    _beside = False  # whether blocks return anything beside the hidden state
    _passes_through = False

    def __init__(
        self, runtime: Runtime, transactions: Sequence[Transaction], rows: Rows, spans: Sequence[Decided]
    ) -> None:
        self._runtime, self._transactions, self._rows, self._spans = runtime, transactions, rows, spans
        assert runtime.policy.predictor is not None
        self._predictor = runtime.policy.predictor
        self.first, self.last = spans[0].span.first, spans[-1].span.last
        self._calls = spans[0].calls
        self._labels: list[list[tuple[str, int]]] = []  # per span, of the blocks that ran
        self.notes: list[Note] = []
        for span, _, verdicts in spans:
            labels: list[tuple[str, int]] = []
            self._labels.append(labels)
            for row, verdict in zip(transactions, verdicts, strict=True):
                reason = verdict.reason
                self.notes.append(Note(row.place, labels, reason is not None, reason or REUSE, verdict.scores))
                row.decided[span.first] = reason is None
                if verdict.drafts:
                    row.drafts.update(verdict.drafts)
        self._computed: list[int] = []  # rows
        self._predictions: dict[int, Tensor] = {}  # per row that is not computed, what stands in for the last span
        self._extras: dict[int, tuple[Any, ...]] = {}  # per block, of the rows computed
        self._memory: dict[int, Mapping[str, Tensor]] = {}

    # Begin.

    def begin(self, block: Block, x: Tensor) -> None:
        """Before the first block runs: keep what the entries need, and let the predictor stand in."""
        for n, verdict in enumerate(self._spans[0].verdicts):
            if verdict.reason is None:
                self._predict(n, verdict.part)
            else:
                self._computed.append(n)
                self._prepare(self._calls[n], self._transactions[n], block)
        if self._predictions:
            self._open_sides(block, x)

    def _prepare(self, call: Call, row: Transaction, block: Block) -> None:
        """For a row that will be computed: keep what its entry needs of the input."""
        signal = self._runtime.signal(call.x) if call.signal is None else None
        if signal is not None and row.has_room(call):
            call.signal = signal.read(call)
        if block.overwrites_input is not False:
            call.x = call.x.clone()

    def _predict(self, n: int, tokens: Tensor | None) -> None:
        """For a row that is not computed: let the predictor stand in."""
        call = self._calls[n]
        call.part = tokens
        if len(self._spans) == 1:
            y, known = self._predictor.predict(call), call.known
            self._beside = self._beside or bool(known.extras)
        else:
            calls = [each.calls[n] for each in self._spans]
            y, known = predict_run(self._runtime, self._transactions[n], calls), calls[-1].known
            self._beside = self._beside or any(call.known.extras for call in calls)
        dtype = known.out_dtype
        self._predictions[n] = y if y.dtype == dtype else y.to(dtype)
        if tokens is None and self._runtime.changed_by_reuse:
            self._keep_reused(n)

    def _keep_reused(self, n: int) -> None:
        """Remember what there is to remember of a reuse."""
        for each in self._spans:
            call = each.calls[n]
            kept = self._predictor.reused(call, self._predictions[n]) if len(self._spans) == 1 else {}
            if not (kept or self._runtime.follows):
                continue
            tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
            if self._runtime.follows and call.signal is not None:
                tensors["signal"] = call.signal.detach()
            numbers = {name: value for name, value in kept.items() if not isinstance(value, Tensor)}
            self._transactions[n].update(call, numbers, tensors)

    def _open_sides(self, block: Block, x: Tensor) -> None:
        """Begin what runs beside the model, and see whether anything else is left to do."""
        for n in self._predictions:
            row = self._transactions[n]
            row.count_reuses(len(self._spans))
            audited = self._runtime.audit.draws(row)
            if audited or self._calls[n].part is not None:
                if self._sides is None:
                    self._sides = Sides(self._runtime, self._transactions, self._rows, self._calls)
                self._sides.add(n, audited=audited)
        if self._sides is not None:
            self._sides.open(block, x)
        if not self._computed and (self._sides is None or not self._sides.audited):
            self._passes_through = not self._beside

    @property
    def reuses(self) -> bool:
        """Whether a prediction stands in for some rows, so that the last block must run to return it."""
        return bool(self._predictions)

    # Run.

    def run(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one block's forward."""
        self._labels[self._at(block.index) if len(self._spans) > 1 else 0].append(block.label)
        output = self._compute(block, args, kwargs) if self._computed else None
        if self._predictions:
            output = self._stand_in(block, output, args, kwargs)
        if block.index == self.first < self.last:
            self._open_shortcuts()
        return output

    def _compute(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block for the rows that need it."""
        calls, runtime = self._calls, self._runtime
        if len(self._computed) < len(self._transactions):
            args, kwargs = block.take(self._computed, args, kwargs)
        if runtime.remembers(block):
            output, self._memory[block.index] = block.run_part(None, {}, args, kwargs)
        else:
            output = block.compute(*args, **kwargs)
        if self.first < block.index < self.last and not self._predictions and isinstance(output, Tensor):
            return output  # the entry is made from the last block's
        if block.overwrites_input is None and block.index == self.first:
            before = self._rows.join([calls[n].x for n in self._computed])
            block.overwrites_input = overwrote(block, before, output, block.read(args, kwargs))
        hidden, extras = block.split(output)
        if block.index - 1 in self._extras:
            given = {id(value) for value in (*args, *kwargs.values())}
            handed = (item for item in self._extras[block.index - 1] if isinstance(item, Tensor))
            self._handed_on &= all(id(item) in given for item in handed)
        if extras is not None:
            self._extras[block.index] = extras
        if block.index == self.last:
            self._remember(block, hidden)
        return output

    def _stand_in(self, block: Block, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output where rows are not computed; ``output`` is what it gave for those that are."""
        last = block.index == self.last
        if self._sides is not None:
            self._sides.run(block, args, kwargs)
            if last:
                self._sides.finish(self._predictions, self.notes, self._keep_reused)
        if last and self.first < self.last:
            self._check_left_out()
        if self._passes_through:
            return self._rows.join([*self._predictions.values()]) if last else block.read(args, kwargs)
        parts = dict(enumerate(self._rows.split(block.read(args, kwargs))))
        if last:  # it answers for the span, whatever the model does to the hidden state between blocks
            parts |= self._predictions
        if self._computed:
            parts |= zip(self._computed, self._rows.split(block.split(output)[0]), strict=True)
        hidden = self._rows.join(list(parts.values()))
        calls = self._spans[self._at(block.index)].calls
        extras: list[Any] = [
            call.entry.extras.get(block.index, call.entry.extras.get(ANY)) if call.entry else None for call in calls
        ]
        if block.index in self._extras:
            for at, n in enumerate(self._computed):
                extras[n] = self._rows.extras(at, len(self._computed), block, self._extras[block.index])
        if extras[0] is None:
            return hidden
        if block.slot.beside is not None:
            return block.joined(hidden, block.slot.beside(block.module, *args, **kwargs))
        columns = zip(*(items for items in extras if items is not None), strict=True)
        # Copies, because a model may write into what a block returns.
        return block.joined(
            hidden, tuple(self._rows.join(c).clone() if isinstance(c[0], Tensor) else c[0] for c in columns)
        )

    def _open_shortcuts(self) -> None:
        """Between the first and the last block there may be nothing left to decide or to look at."""
        runtime = self._runtime
        plainly = not (self._predictions or runtime.policy.parts) and runtime.alike.get(self.first)
        if self._sides or not (self._passes_through or plainly):
            return
        blocks = runtime.blocks[self.first + 1 : self.last]
        labels = runtime.shortcuts.open(blocks, computed=not self._passes_through)
        if len(self._spans) == 1:
            self._labels[0] += labels
            return
        at = 0
        for label in labels:
            while label[1] > self._spans[at].span.last:
                at += 1
            self._labels[at].append(label)

    # Remember.

    def _remember(self, block: Block, hidden: Tensor) -> None:
        """Make the entries of the rows that were computed."""
        extras = self._lasting()
        left_out = self._left_out(self._spans[0], self._labels[0]) if self.first < self.last else ()
        for at, (n, y) in enumerate(zip(self._computed, self._rows.split(hidden), strict=True)):
            call, count = self._calls[n], len(self._computed)
            beside: dict[str, Tensor] = {}
            if call.signal is not None:
                beside["signal"] = call.signal.detach()
            own = {b: self._rows.extras(at, count, block, items) for b, items in extras.items()}
            memory = self._rows.memory(at, count, self._memory)
            self._transactions[n].hold(call, y, beside, own, memory, left_out)

    def _left_out(self, each: Decided, labels: Sequence[tuple[str, int]]) -> tuple[int, ...]:
        """The blocks of a span that the model did not run in this pass."""
        span, left = each.span, self._runtime.shortcuts.left
        if not left and len(labels) == span.last - span.first + 1:
            return ()
        ran = {number for _, number in labels} - left.keys()
        return tuple(number for number in range(span.first, span.last + 1) if number not in ran)

    def _check_left_out(self) -> None:
        """A prediction stands for the blocks that ran when the span was computed: the same must run now.

        Raises:
            ValueError: the model left out other blocks than then.
        """
        for each, labels in zip(self._spans, self._labels, strict=True):
            now = self._left_out(each, labels)
            for n in self._predictions:
                if now != (then := each.calls[n].known.left_out):
                    name = self._runtime.blocks[min(set(now) ^ set(then))].name
                    raise ValueError(
                        f"the model {'left out' if now > then else 'ran'} block {name!r}, unlike when its span was "
                        f"computed; give passes that leave out blocks a branch of their own: step(branch=...)"
                    )

    def _lasting(self) -> dict[int, tuple[Any, ...]]:
        """What blocks returned beside the hidden state, as far as the entry keeps it.

        Where every block hands it on to the next, as is found out when they first run, the last one's is enough: those
        before it are reused as well, and never look at it. An audit runs them, and is given what was theirs.
        """
        extras, alike = self._extras, self._runtime.alike
        if self.first not in alike and len(self._computed) == len(self._transactions):
            kinds = [[(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in items] for items in extras.values()]
            whole = len(kinds) == self.last - self.first + 1 and all(kind == kinds[-1] for kind in kinds)
            alike[self.first] = not kinds or (whole and self._handed_on and self._runtime.audit.rate == 0)
        return {ANY: extras[self.last]} if extras and alike.get(self.first) else extras

    def _at(self, block: int) -> int:
        """Which of the spans a block is in."""
        if len(self._spans) == 1:
            return 0
        return next(n for n, each in enumerate(self._spans) if block <= each.span.last)


def overwrote(block: Block, before: Tensor, output: Any, entered: Tensor) -> bool:
    """Whether a block that has run overwrote its input."""
    hidden = block.split(output)[0]
    aliased = hidden.data_ptr() == entered.data_ptr()  # a later block of the span could overwrite it
    return aliased or not torch.equal(before, entered)

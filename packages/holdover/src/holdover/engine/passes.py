"""One forward pass, from ``with cache.step(...)`` to its end: every block asks here whether to run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from holdover.engine.contract import Call, Predictor
from holdover.engine.rows import Row, Runtime
from holdover.engine.slots import Block, Span
from holdover.engine.state import ANY
from holdover.engine.step import Step
from holdover.engine.trace import REUSE, Note, Tally, place

EXEMPT = {"kv_update": "kv update", "prefill": "prefill"}

#: After this many chunks in a row in which no gate was asked, the schedule leaves nothing to reuse.
BARREN = 8


@dataclass(slots=True, kw_only=True)
class OpenSpan:
    """A span that the pass is in: its first block has been answered, its last may not have been.

    Attributes:
        calls: per row what its gate and predictor were shown.
        reasons: per row why it is computed, None where it is reused; ``scores`` is what the gate looked at.
        computed: the rows that are computed.
        apart: whether rows can be computed without the others.
        predictions: the span's output for the rows that are reused.
        audited: those of them that the audit computes as well; ``shadow`` is the hidden state so far.
        blocks: name and number of those that have run.
        notes: per row what the trace will tell of them.
        extras: per block what it returned beside the hidden state, for the rows computed.
        handed_on: whether every block so far was given the tensors that the one before returned beside.
        passes_through: blocks before the last give back what they are given, and nothing else.
    """

    span: Span
    rows: Sequence[Row]
    calls: Sequence[Call]
    reasons: Sequence[str | None]
    scores: Sequence[Mapping[str, float]]
    apart: bool
    predictions: dict[int, Tensor] = field(default_factory=dict)
    audited: list[int] = field(default_factory=list)
    shadow: Tensor | None = None
    blocks: list[tuple[str, int]] = field(default_factory=list)
    notes: list[Note] = field(init=False)
    extras: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    computed: list[int] = field(init=False)
    handed_on: bool = True
    passes_through: bool = False

    def __post_init__(self) -> None:
        self.computed, self.notes = [], []
        for n, reason in enumerate(self.reasons):
            if reason is not None:
                self.computed.append(n)
            self.notes.append(
                Note(self.rows[n].place, self.blocks, reason is not None, reason or REUSE, self.scores[n])
            )


class Pass:
    """A forward pass in progress.

    ``batched`` says that every row of the batch is a stream or branch of its own.

    Raises:
        ValueError: the model runs a block twice, or a span from its middle; the rows do not match the batch.
    """

    def __init__(self, runtime: Runtime, steps: Sequence[Step], batched: bool) -> None:
        self._runtime, self._batched = runtime, batched
        self._steps, self._role = steps, steps[0].role
        self._rows = [Row(runtime, step) for step in steps] if self._role == "denoise" else []
        self._notes: list[Note] = []
        #: Why every block is computed, where it is.
        self._always = EXEMPT.get(self._role) or (runtime.policy.name if runtime.policy.predictor is None else None)
        self._ran: set[int] = set()
        self._settled: set[int] = set()
        self._open: OpenSpan | None = None
        self._entry: Tensor | None = None

    def run(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one block's forward."""
        if self._role == "denoise":
            self._check(block, args, kwargs)
        if self._always is not None:
            return self._plainly(block, self._always, args, kwargs)
        span = self._runtime.span_of[block.index]
        if span.computed is not None:
            return self._probe(block, span.computed, args, kwargs)
        if block.index == span.first:
            self._open = self._decide(block, span, args, kwargs)
            self._notes += self._open.notes
        elif self._open is None or self._open.span is not span:
            raise ValueError(f"block {block.name!r} ran before the first of its span; list slots in the model's order")
        current = self._open
        current.blocks.append(block.label)
        output = self._compute(block, current, args, kwargs) if current.computed else None
        if current.predictions:
            output = self._reuse(block, current, output, args, kwargs)
        if block.index == span.first < span.last:
            self._settle(current)
        if block.index == span.last:
            self._open = None
        return output

    def _check(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if block.index in self._ran or (block.index in self._settled and block.index not in self._runtime.settled):
            raise ValueError(
                f"block {block.name!r} ran twice within one step; give every forward pass a step of its own, guidance "
                f"branches with step(branch=...)"
            )
        if block.slot.kv_update is not None and block.slot.kv_update(block.module, *args, **kwargs):
            raise ValueError(
                f"block {block.name!r} writes the KV cache within a denoising step; wrap this pass: "
                f"`with cache.step(chunk=n, role='kv_update'): model(...)`"
            )
        self._ran.add(block.index)

    def _plainly(self, block: Block, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a block of a pass in which all are."""
        if not self._notes:
            settled, labels = self._runtime.settle(0, len(self._runtime.blocks) - 1, computed=True)
            self._settled.update(settled)
            blocks = list(labels)
            self._notes = [Note(place(step), blocks, True, reason, {}) for step in self._steps]
        if not self._runtime.settled.pop(block.index, False):
            self._notes[0].blocks.append(block.label)
        return block.compute(*args, **kwargs)

    def _probe(self, block: Block, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a block that is computed at every pass, and of which nothing is held."""
        x = self._entering(block, args, kwargs)
        if self._runtime.policy.reads_entry:
            self._entries(block, x)
        labels = [block.label]
        self._notes += [Note(row.place, labels, True, reason, {}) for row in self._rows]
        output = block.compute(*args, **kwargs)
        if block.overwrites_input is None and self._entry is not None and len(self._ran) == 1:
            block.overwrites_input = _overwrote(block, self._entry, output, args, kwargs)
        return output

    def _settle(self, current: OpenSpan) -> None:
        """Between the first and the last block of a span there may be nothing left to decide or to look at."""
        span = current.span
        if current.passes_through or (not current.predictions and self._runtime.alike.get(span.first)):
            settled, labels = self._runtime.settle(span.first + 1, span.last - 1, computed=not current.passes_through)
            self._settled.update(settled)
            current.blocks += labels

    def close(self) -> None:
        """The model has run, well or not."""
        left = self._runtime.settled
        if left:  # it left out blocks that were noted when they were settled
            for note in self._notes:
                note.blocks[:] = [label for label in note.blocks if label[1] not in left]
            left.clear()

    def commit(self) -> None:
        """The pass ended well: its decisions, and what it held, become the streams'."""
        tallies = self._runtime.tallies
        for note in self._notes:
            tallies[note.place.stream].count(note)
        self._runtime.trace.extend(self._notes)
        if not self._notes:
            return
        for row in self._rows:
            row.commit()
        for row in self._rows:
            if row.audit_errors:
                self._heed_audit(row, tallies[row.step.stream])
            if (row.stream.barren or 0) >= BARREN:
                self._warn_if_barren(row)

    def roll_back(self) -> None:
        """The pass failed."""
        for row in self._rows:
            row.roll_back()

    def _decide(self, block: Block, span: Span, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpenSpan:
        x = self._entering(block, args, kwargs)
        predictor = self._runtime.policy.predictor
        parts = self._per_row(x)
        entries = self._entries(block, x) if self._runtime.policy.reads_entry else parts
        reading = self._runtime.reading(parts[0])
        taps: dict[str, Sequence[Tensor]] = {}

        def tap(name: str, *, row: int) -> Tensor:
            if name not in taps:
                taps[name] = self._per_row(block.tap(name, args, kwargs))
            return taps[name][row]

        def compute(hidden: Tensor) -> Tensor:
            other_args, other_kwargs = block.replace(args, kwargs, hidden)
            return block.split(block.compute(*other_args, **other_kwargs))[0]

        calls: list[Call] = []
        reasons: list[str | None] = []
        scores: list[Mapping[str, float]] = []
        for n, row in enumerate(self._rows):
            call = row.call(span, parts[n], entries[n], partial(tap, row=n), compute)
            verdict = row.judge(call, reading)
            calls.append(call)
            reasons.append(verdict.reason)
            scores.append(verdict.scores)
        apart = self._batched and self._runtime.splits(span)
        if self._batched or self._runtime.process_group is not None:
            reasons = self._agree(reasons, x, apart)
        current = OpenSpan(span=span, rows=self._rows, calls=calls, reasons=reasons, scores=scores, apart=apart)
        for n, row in enumerate(self._rows):
            row.decided[span.first] = reasons[n] is None
        if predictor is None:
            return current
        for n, (row, call) in enumerate(zip(self._rows, calls, strict=True)):
            if reasons[n] is not None:
                if call.signal is None:
                    row.prepare(call, reading)
                if block.overwrites_input is not False:
                    call.x = call.x.clone()
                continue
            current.predictions[n] = _predicted(predictor, call)
            row.reuse(call, current.predictions[n])
            if row.draw_audit():
                current.audited.append(n)
        if not (current.computed or current.audited):
            current.passes_through = not any(call.held is not None and call.held.extras for call in calls)
        if current.audited:
            current.shadow = self._joined([parts[n] for n in current.audited]) if apart else x
            if block.overwrites_input is not False:
                current.shadow = current.shadow.clone()
        return current

    def _entering(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The hidden state that enters a block, with a row per step."""
        x = block.read(args, kwargs)
        if self._batched and x.shape[0] != len(self._rows):
            raise ValueError(f"the batch has {x.shape[0]} rows, the step {len(self._rows)}; pass one Step per row")
        return x

    def _entries(self, block: Block, x: Tensor) -> Sequence[Tensor]:
        """What entered the pass's first block, by row; kept from there on for the spans that follow."""
        if self._entry is None:
            self._entry = x if block.overwrites_input is False else x.clone()
        return self._per_row(self._entry)

    def _agree(self, reasons: list[str | None], x: Tensor, apart: bool) -> list[str | None]:
        """Per row why it is computed, be it that another row, or another rank, needs it; None where nobody does."""
        if not apart and any(reason is not None for reason in reasons):
            reasons = [reason or "batch" for reason in reasons]
        if self._runtime.process_group is None:
            return reasons
        needed = torch.tensor([reason is not None for reason in reasons], dtype=torch.int32, device=x.device)
        dist.all_reduce(needed, op=dist.ReduceOp.MAX, group=self._runtime.process_group)
        return [reason or ("group" if need else None) for reason, need in zip(reasons, needed.tolist(), strict=True)]

    def _compute(self, block: Block, current: OpenSpan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block for the rows that need it."""
        computed, span, runtime = current.computed, current.span, self._runtime
        if len(computed) < len(current.rows):
            args, kwargs = block.take(computed, args, kwargs)
        output = block.compute(*args, **kwargs)
        if runtime.policy.predictor is None:
            return output
        within = span.first < block.index < span.last
        if within and not current.predictions and isinstance(output, Tensor):
            return output  # what is held comes from the last block
        if block.overwrites_input is None and block.index == span.first:
            before = self._joined([current.calls[n].x for n in computed])
            block.overwrites_input = _overwrote(block, before, output, args, kwargs)
        hidden, extras = block.split(output)
        if block.index - 1 in current.extras:
            given = {id(value) for value in (*args, *kwargs.values())}
            handed = (item for item in current.extras[block.index - 1] if isinstance(item, Tensor))
            current.handed_on &= all(id(item) in given for item in handed)
        if extras is not None:
            current.extras[block.index] = extras
        if block.index == span.last:
            lasting = self._lasting(current)
            for n, (at, y) in enumerate(zip(computed, self._per_row(hidden), strict=True)):
                rest = lasting
                if self._batched and rest:
                    rest = {b: self._extras_of(n, len(computed), block, items) for b, items in rest.items()}
                current.rows[at].remember(current.calls[at], y, rest)
        return output

    def _lasting(self, current: OpenSpan) -> dict[int, tuple[Any, ...]]:
        """What blocks returned beside the hidden state, as far as it is held.

        Where every block hands it on to the next, as is found out when they first run, the last one's is enough: those
        before it are reused as well, and never look at it. An audit runs them, and is given what was theirs.
        """
        extras, span, alike = current.extras, current.span, self._runtime.alike
        if span.first not in alike and len(current.computed) == len(current.rows):
            kinds = [[(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in items] for items in extras.values()]
            whole = len(kinds) == span.last - span.first + 1 and all(kind == kinds[-1] for kind in kinds)
            alike[span.first] = not kinds or (whole and current.handed_on and self._runtime.audit.rate == 0)
        return {ANY: extras[span.last]} if extras and alike.get(span.first) else extras

    def _reuse(
        self, block: Block, current: OpenSpan, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The block's output where rows are reused; ``output`` is what it gave for the rows computed, if any."""
        if current.passes_through and block.index != current.span.last:
            return block.read(args, kwargs)
        computed = current.computed
        parts = dict(enumerate(self._per_row(block.read(args, kwargs))))
        if block.index == current.span.last:
            # The last block answers for the span, whatever the model does to the hidden state between blocks.
            parts |= current.predictions
        if current.shadow is not None:
            taken = block.take(current.audited, args, kwargs) if current.apart else (args, kwargs)
            shadow_args, shadow_kwargs = block.replace(*taken, current.shadow)
            current.shadow, _ = block.split(block.compute(*shadow_args, **shadow_kwargs))
            if block.index == current.span.last:
                self._audit(current, parts, current.shadow)
        if computed:
            parts |= zip(computed, self._per_row(block.split(output)[0]), strict=True)
        hidden = self._joined(list(parts.values()))
        extras = [
            call.held.extras.get(block.index, call.held.extras.get(ANY)) if call.held else None
            for call in current.calls
        ]
        if block.index in current.extras:
            for n, at in enumerate(computed):
                items = current.extras[block.index]
                extras[at] = self._extras_of(n, len(computed), block, items) if self._batched else items
        if extras[0] is None:
            return hidden
        if block.slot.beside is not None:
            return block.joined(hidden, block.slot.beside(block.module, *args, **kwargs))
        columns = zip(*(items for items in extras if items is not None), strict=True)
        # Copies, because a model may write into what a block returns.
        return block.joined(
            hidden, tuple(self._joined(c).clone() if isinstance(c[0], Tensor) else c[0] for c in columns)
        )

    def _audit(self, current: OpenSpan, predicted: Mapping[int, Tensor], computed: Tensor) -> None:
        """Note the relative error of a reused span beside its last block's decision."""
        truths = self._per_row(computed.float())
        for at, n in enumerate(current.audited):
            row, guess, truth = current.rows[n], predicted[n].float(), truths[at if current.apart else n]
            norm = torch.linalg.vector_norm
            error = float(norm(guess - truth) / norm(truth).clamp_min(torch.finfo(torch.float32).tiny))
            row.audit_errors.append(math.inf if math.isnan(error) else error)
            current.notes[n].audit = row.audit_errors[-1]

    def _heed_audit(self, row: Row, tally: Tally) -> None:
        limit = self._runtime.audit.limit
        for error in row.audit_errors:
            tally.count_audit(error)
        if row.stream.alarmed or not any(error > limit for error in row.audit_errors):
            return
        row.stream.alarmed = True
        if not any(known.alarmed for known in self._runtime.tallies.values()):
            warnings.warn(
                f"{self._runtime.policy.name}: a reused span of stream {row.step.stream!r} was off by "
                f"{max(row.audit_errors):.3g}, past the audit's limit of {limit:.3g}; the stream is computed until "
                f"cache.reset({row.step.stream!r})",
                stacklevel=4,
            )
        tally.alarmed = True

    def _warn_if_barren(self, row: Row) -> None:
        runtime = self._runtime
        if runtime.policy.predictor is None or runtime.warned_barren:
            return
        runtime.warned_barren = True
        reasons = runtime.tallies[row.step.stream].reasons
        warnings.warn(
            f"{runtime.policy.name} could reuse nothing in {BARREN} chunks in a row: "
            f"{', '.join(f'{reason} {count}' for reason, count in reasons.most_common())}. Where the reason is "
            f"'kv cycle', pass step(commits=False) for chunks whose latents the KV update does not write",
            stacklevel=4,
        )

    def _per_row(self, x: Tensor) -> Sequence[Tensor]:
        return torch.split(x, 1) if self._batched else (x,)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)) if self._batched else parts[0]

    def _extras_of(self, row: int, rows: int, block: Block, items: tuple[Any, ...]) -> tuple[Any, ...]:
        """The share of one of ``rows`` rows in what a block returned beside its hidden state."""
        for item in items:
            if isinstance(item, Tensor) and (item.dim() == 0 or item.shape[0] != rows):
                raise ValueError(
                    f"block {block.name!r} returns a tensor of shape {list(item.shape)} beside its hidden state, which "
                    f"has no row per stream; give each stream a pass of its own"
                )
        return tuple(item[row : row + 1] if isinstance(item, Tensor) else item for item in items)


def _overwrote(block: Block, before: Tensor, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block that has run overwrote its input."""
    hidden, entered = block.split(output)[0], block.read(args, kwargs)
    aliased = hidden.data_ptr() == entered.data_ptr()  # a later block of the span could overwrite it
    return aliased or not torch.equal(before, entered)


def _predicted(predictor: Predictor, call: Call) -> Tensor:
    assert call.held is not None
    return predictor.predict(call).to(call.held.out_dtype)

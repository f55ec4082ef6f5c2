"""One forward pass under one policy, from ``with cache.step(...)`` to its end: every block asks here whether to run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from holdover.engine.blocks import Block
from holdover.engine.decide import Decider
from holdover.engine.rows import Rows
from holdover.engine.runtime import Runtime
from holdover.engine.span_run import SpanRun, overwrote
from holdover.engine.trace import Note, place
from holdover.engine.transaction import Transaction
from holdover.engine.watch import State, containers, written
from holdover.method import Span, Verdict
from holdover.step import Step

#: Passes of these roles are computed in full, always.
EXEMPT = {"kv_update": "kv update", "prefill": "prefill"}

#: After this many chunks in a row in which no trigger was asked, the loop leaves nothing to reuse.
BARREN = 2


class Pass:
    """A forward pass in progress.

    ``batched`` says that every row of the batch is a stream or branch of its own.

    Raises:
        ValueError: the model runs a block twice, or a span from its middle; the rows do not match the batch.
    """

    def __init__(self, runtime: Runtime, steps: Sequence[Step], batched: bool) -> None:
        self._runtime, self._rows = runtime, Rows(batched)
        self._steps, self._role = steps, steps[0].role
        policy = runtime.policy
        self._transactions: list[Transaction] = []
        if self._role == "denoise":
            self._transactions = [Transaction(runtime.streams, policy, runtime.max_bytes, step) for step in steps]
        self._decider = Decider(runtime, self._transactions, self._rows)
        self._notes: list[Note] = []
        #: Why every block is computed, where it is.
        self._always = EXEMPT.get(self._role) or (policy.name if policy.predictor is None else None)
        self._ran = runtime.shortcuts.ran
        self._open: SpanRun | None = None
        #: By first block, verdicts of spans that were decided together with an earlier one.
        self._foreseen: dict[int, list[Verdict]] = {}
        self._pass_input: Tensor | None = None
        self._served_outside: str | None = None

    def run(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one block's forward."""
        if self._role == "denoise":
            self._check(block, args, kwargs)
        if block.watched or self._always is not None:
            return self._answer(block, args, kwargs)
        before = containers(args, kwargs)
        output = self._answer(block, args, kwargs)
        if any(note.computed and block.label in note.blocks for note in self._notes):
            self._refuse_writes(block, before, args, kwargs)
        return output

    def _answer(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index, run = block.index, self._open
        if run is None or not run.first <= index <= run.last:
            if self._always is not None:
                return self._compute(block, self._always, args, kwargs)
            span = self._runtime.span_of[index]
            if span.computed is not None:
                return self._probe(block, span.computed, args, kwargs)
            if run is not None:
                self._require_whole()
            run = self._open = self._decide(block, span, args, kwargs)
        if index == run.last:
            self._open = None
        return run.run(block, args, kwargs)

    @property
    def served(self) -> str | None:
        """The policy's name, if it served the whole pass from cache, so that nothing inside of it ran."""
        computed = not self._notes or any(note.computed or "recomputed" in note.scores for note in self._notes)
        return self._served_outside or (None if computed else self._runtime.policy.name)

    def served_outside(self, policy: str) -> None:
        """An outer policy served this pass: no block was asked."""
        self._served_outside = policy

    def finish(self) -> None:
        """The model has run.

        Raises:
            ValueError: it left out the last block of a reused span.
        """
        self._require_whole()
        self._close()

    def commit(self) -> None:
        """The pass ended well: its decisions and its entries become the streams'."""
        runtime = self._runtime
        if self._served_outside is not None:
            labels = [block.label for block in runtime.blocks]
            self._notes = [Note(place(step), labels, False, self._served_outside, {}) for step in self._steps]
        if runtime.innermost:
            for note in self._notes:
                runtime.tallies[note.place.stream].count(note)
        runtime.trace.extend(self._notes)
        if not self._notes:
            self.roll_back()
            self._warn_if_empty()
            return
        for row in self._transactions:
            row.commit()
        for row in self._transactions:
            if row.audit_errors:
                runtime.audit.heed(row, runtime.tallies, runtime.policy.name)
            if (row.stream.barren or 0) >= BARREN and not row.asked:
                self._warn_if_barren(row)

    def roll_back(self) -> None:
        """The pass failed."""
        self._close()
        for row in self._transactions:
            row.roll_back()

    def _check(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if block.index in self._ran:
            raise ValueError(
                f"block {block.name!r} ran twice within one step; give every forward pass a step of its own, guidance "
                f"branches with step(branch=...)"
            )
        self._ran.add(block.index)
        if block.slot.kv_update is not None and block.slot.kv_update(block.module, *args, **kwargs):
            raise ValueError(
                f"block {block.name!r} writes the KV cache within a denoising step; wrap this pass: "
                f"`with cache.step(chunk=n, role='kv_update'): model(...)`"
            )

    def _refuse_writes(self, block: Block, before: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block that is about to be cached must not write into what it is given, unless its slot says so."""
        where = None if block.slot.writes_kv else written(before, args, kwargs)
        if where is not None:
            raise ValueError(
                f"block {block.name!r} wrote into {where} in a denoising pass, and a reused block would not; if "
                f"that is the KV cache, wrap the pass that writes it: `with cache.step(chunk=n, role='kv_update'): "
                f"model(...)`; if it may be left out, say so: holdover.Slot({block.name!r}, writes_kv=True)"
            )
        block.watched = True

    def _compute(self, block: Block, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a block of a pass in which all are."""
        shortcuts = self._runtime.shortcuts
        if not self._notes:
            labels = shortcuts.open(self._runtime.blocks, computed=True)
            blocks = list(labels)
            self._notes = [Note(place(step), blocks, True, reason, {}) for step in self._steps]
        if not shortcuts.left.pop(block.index, False):
            self._notes[0].blocks.append(block.label)
        return block.compute(*args, **kwargs)

    def _probe(self, block: Block, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a block that is computed in every pass and has no entry."""
        x = self._entering(block, args, kwargs)
        labels = [block.label]
        self._notes += [Note(row.place, labels, True, reason, {}) for row in self._transactions]
        output = block.compute(*args, **kwargs)
        if block.overwrites_input is None and self._pass_input is not None and len(self._ran) == 1:
            block.overwrites_input = overwrote(block, self._pass_input, output, x)
        return output

    def _decide(self, block: Block, span: Span, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SpanRun:
        if block.index != span.first:
            raise ValueError(
                f"block {block.name!r} ran before the first of its span, "
                f"{self._runtime.blocks[span.first].name!r}; list slots in the model's order, and do not attach to "
                f"blocks that the model leaves out"
            )
        x, foreseen = self._entering(block, args, kwargs), self._foreseen.pop(span.first, None)
        decided = self._decider.decide(block, span, args, kwargs, x=x, pass_input=self._pass_input, foreseen=foreseen)
        if len(decided) > 1 and not decided[-1].reused:
            self._foreseen[decided[-1].span.first] = decided.pop().verdicts
        run = SpanRun(self._runtime, self._transactions, self._rows, decided)
        self._notes += run.notes
        run.begin(block, x)
        return run

    def _entering(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The hidden state that enters a block, a row per step; the first one is kept for policies that read it."""
        x = block.read(args, kwargs)
        if self._rows.batched and x.shape[0] != len(self._transactions):
            raise ValueError(
                f"the batch has {x.shape[0]} rows, the step {len(self._transactions)}; pass one Step per row"
            )
        if self._pass_input is None and self._runtime.policy.reads_pass_input:
            self._pass_input = x if block.overwrites_input is False else x.clone()
        return x

    def _require_whole(self) -> None:
        """A reused span answers with its last block: leaving that out would leave the span out."""
        run, self._open = self._open, None
        if run is not None and run.reuses:
            raise ValueError(
                f"the model left out block {self._runtime.blocks[run.last].name!r}, the last of a reused span; give "
                f"passes that leave out blocks a branch of their own: step(branch=...)"
            )

    def _close(self) -> None:
        """Forget the shortcuts. Blocks that the model left out were noted when these were opened."""
        never_ran = self._runtime.shortcuts.close()
        if never_ran:
            for note in self._notes:
                note.blocks[:] = [label for label in note.blocks if label[1] not in never_ran]

    def _warn_if_barren(self, row: Transaction) -> None:
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

    def _warn_if_empty(self) -> None:
        """A denoising pass in which no block was asked ran without the cache, if it ran."""
        runtime, step = self._runtime, self._steps[0]
        if self._role != "denoise" or runtime.warned_empty:
            return
        runtime.warned_empty = True
        warnings.warn(
            f"no block was asked within the step of chunk {step.chunk}, index {step.index}, so {runtime.policy.name} "
            f"did nothing: call the model that the cache is attached to within `with cache.step(...)`, not a copy of "
            f"it or a CUDA graph that replays it; a chunk that runs no pass is told by cache.hold(chunk=...)",
            stacklevel=4,
        )

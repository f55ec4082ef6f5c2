"""The decision: for a span that is about to run, per row of the batch, whether it is computed, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from holdover.decision import ACTION, WARM_UP
from holdover.engine.ahead import LookAhead
from holdover.engine.blocks import Block
from holdover.engine.gradients import recorded, warn
from holdover.engine.rows import Rows
from holdover.engine.runtime import Runtime
from holdover.engine.transaction import Transaction
from holdover.method import Call, Signal, Span, Verdict

#: Of `_kind`: the span is computed.
_COMPUTED = 2**30


class Decided(NamedTuple):
    """One span's calls and verdicts, per row."""

    span: Span
    calls: list[Call]
    verdicts: list[Verdict]

    @property
    def reused(self) -> bool:
        """Whether every row reuses the whole span."""
        return all(verdict.reason is None and verdict.part is None for verdict in self.verdicts)


class Decider:
    """Decides for the rows of one pass."""

    def __init__(self, runtime: Runtime, transactions: Sequence[Transaction], rows: Rows) -> None:
        self._runtime, self._transactions, self._rows = runtime, transactions, rows
        self._alone = not rows.batched and runtime.process_group is None
        self._may_record = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self._gradients: bool | None = None  # whether those of parameters are recorded in this pass

    def decide(
        self,
        block: Block,
        span: Span,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        x: Tensor,
        pass_input: Tensor | None,
        foreseen: list[Verdict] | None,
    ) -> list[Decided]:
        """Decide on a span that begins with this block; ``foreseen`` are verdicts given with those of an earlier span.

        Returns:
            The span. Where the policy looks ahead and it is reused: also those after it that are, and the first that
            is not.
        """
        parts = self._rows.split(x)
        signal = self._runtime.signal(parts[0])
        calls = self._make_calls(block, span, parts, pass_input, args, kwargs)
        decided = [Decided(span, calls, foreseen)] if foreseen is not None else self._judge_all(span, calls, signal)
        if self._alone:
            return decided
        verdicts = self._agree(decided[0].verdicts, x, self._rows.batched and self._runtime.splits(span))
        decided[0] = Decided(span, calls, verdicts)
        return decided if decided[0].reused else decided[:1]

    def _make_calls(
        self,
        block: Block,
        span: Span,
        parts: Sequence[Tensor],
        pass_input: Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Call]:
        pass_inputs = parts if pass_input is None else self._rows.split(pass_input)
        taps: dict[str, Sequence[Tensor]] = {}
        first, count, kind = span.first, len(self._runtime.blocks), block.slot.kind
        return [
            Call(
                step=row.step,
                span=span,
                blocks=count,
                kind=kind,
                chunk=row.ordinal,
                full_action=row.full_action,
                x=parts[n],
                pass_input=pass_inputs[n],
                entry=row.entry(first),
                tap=partial(self._tap, taps, n, block, args, kwargs),
                peer=row.entry,
                view_groups=self._runtime.view_groups,
                prediction=block.slot.prediction,
            )
            for n, row in enumerate(self._transactions)
        ]

    def _tap(
        self,
        taps: dict[str, Sequence[Tensor]],
        row: int,
        block: Block,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str,
    ) -> Tensor:
        if name not in taps:
            taps[name] = self._rows.split(block.tap(name, args, kwargs))
        return taps[name][row]

    def _judge_all(self, span: Span, calls: list[Call], signal: Signal | None) -> list[Decided]:
        """Judge a span and, where the policy looks ahead, those after it, up to the first that is not reused."""
        rows = self._transactions
        if signal is None or self._runtime.policy.look_ahead == 1:
            verdicts = [self._judge(row, call, signal) for row, call in zip(rows, calls, strict=True)]
            return [Decided(span, calls, verdicts)]
        forced = [self._forced(row, call) for row, call in zip(rows, calls, strict=True)]
        free = forced.count(None) == len(forced)
        ahead = self._runtime.spans_after(span, min([row.reach for row in rows])) if free else ()
        if not ahead:
            triples = zip(rows, calls, forced, strict=True)
            found = [Decided(span, calls, [self._verdict(*triple, signal) for triple in triples])]
            asked = 1
        else:
            look, found = LookAhead(self._runtime, rows, calls, ahead, self._forced), []
            for own_calls, metrics in zip(look.lineup, look.measure(signal), strict=True):
                verdicts = [self._weigh(*each) for each in zip(rows, own_calls, metrics, strict=True)]
                found.append(Decided(own_calls[0].span, own_calls, verdicts))
                if not found[-1].reused:
                    break
            asked = len(look.lineup)
        if free:
            for row in rows:
                row.ran_on(sum([each.reused for each in found]), asked)
        return found

    def _judge(self, row: Transaction, call: Call, signal: Signal | None) -> Verdict:
        """Whether a span is computed: what forces it, else the trigger by its signal."""
        return self._verdict(row, call, self._forced(row, call), signal)

    def _verdict(self, row: Transaction, call: Call, forced: str | None, signal: Signal | None) -> Verdict:
        if forced is not None:
            return Verdict(forced)
        metrics: dict[str, float] = {}
        if signal is not None:
            call.signal = signal.read(call)
            metrics = signal.metrics(signal.compare(call.signal, call.known.tensors["signal"]).tolist())
        return self._weigh(row, call, metrics)

    def _records_gradients(self, call: Call) -> bool:
        if self._gradients is None:
            self._gradients = recorded(block.module for block in self._runtime.blocks)
        if not self._gradients and not call.x.requires_grad:
            return False
        if not self._runtime.warned_gradients:
            self._runtime.warned_gradients = True
            warn()
        return True

    def _forced(self, row: Transaction, call: Call) -> str | None:
        """Why a span is computed before anything is read: the guard's reason, else the engine's own."""
        policy = self._runtime.policy
        if self._may_record and self._records_gradients(call):
            return "gradients"
        if policy.one_for_all_branches and row.led.get(call.span.first) is False:
            return "branch"
        reason = policy.trigger.guard(call)
        if reason is None:
            row.asked = True  # or would be, but for the engine
            return row.refusal(call)
        row.warm_up |= reason == WARM_UP
        row.asked |= reason == ACTION
        return reason

    def _weigh(self, row: Transaction, call: Call, metrics: dict[str, float]) -> Verdict:
        """The trigger's verdict."""
        policy = self._runtime.policy
        if metrics and not all(map(math.isfinite, metrics.values())):
            return Verdict("nan", metrics)
        verdict = policy.trigger.judge(call, metrics)
        if verdict.numbers:
            row.update(call, verdict.numbers)
        led = policy.one_for_all_branches and row.led.get(call.span.first)
        return verdict._replace(reason=None) if led else verdict

    def _agree(self, verdicts: list[Verdict], x: Tensor, apart: bool) -> list[Verdict]:
        """What each row does, given what other rows, or other ranks, need."""
        if not apart and len({_kind(verdict) for verdict in verdicts}) > 1:
            verdicts = [v if v.reason is not None else Verdict("batch", v.scores) for v in verdicts]
        if self._runtime.process_group is None:
            return verdicts
        kinds = [_kind(verdict) for verdict in verdicts]
        most = torch.tensor([kinds, [-kind for kind in kinds]], dtype=torch.int32, device=x.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._runtime.process_group)
        largest, smallest = most.tolist()
        return [
            Verdict("group", verdict.scores) if verdict.reason is None and high != -low else verdict
            for verdict, high, low in zip(verdicts, largest, smallest, strict=True)
        ]


def _kind(verdict: Verdict) -> int:
    """A number that is the same for rows that can run together."""
    if verdict.reason is not None:
        return _COMPUTED
    return 0 if verdict.part is None else 1 + verdict.part.shape[-1]

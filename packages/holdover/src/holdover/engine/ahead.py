"""Several spans decided at once, from the input of the first: what a reused span adds to a linear signal is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from weakref import ref

import torch
from torch import Tensor

from holdover.engine.runtime import Runtime
from holdover.engine.streams import Run
from holdover.engine.transaction import Transaction
from holdover.method import Call, Signal, Span

#: Of a row and a call: why the span is computed before anything is read.
Forced = Callable[[Transaction, Call], str | None]


class LookAhead:
    """Looks ahead from one span, in every row.

    Args:
        calls: of the first span, a row each; all of them ask the trigger.
        spans: those after it.
    """

    def __init__(
        self,
        runtime: Runtime,
        rows: Sequence[Transaction],
        calls: Sequence[Call],
        spans: Sequence[Span],
        forced: Forced,
    ) -> None:
        self._runtime, self._rows = runtime, rows
        #: The calls of every span that can be judged from here, a row each.
        self.lineup = [list(calls)]
        for span in spans:
            following = self._following(span)
            if following is None or any(forced(*pair) is not None for pair in zip(rows, following, strict=True)):
                break
            self.lineup.append(following)

    def measure(self, signal: Signal) -> Iterator[list[dict[str, float]]]:
        """The metrics of every span, a row each. They are read from the device at once."""
        now, then = [], []
        for row, *calls in zip(self._rows, *self.lineup, strict=True):
            run = self._known(row, calls, signal)
            calls[0].signal = signal.read(calls[0])
            signals = calls[0].signal + run.change
            for call, own in zip(calls, signals, strict=True):
                call.signal = own
            now.append(signals)
            then.append(run.then)
        alone = len(now) == 1
        numbers = signal.compare(now[0] if alone else torch.cat(now), then[0] if alone else torch.cat(then)).tolist()
        for at in range(len(self.lineup)):
            yield [signal.metrics(each) for each in numbers[at :: len(self.lineup)]]

    def _following(self, span: Span) -> list[Call] | None:
        """The calls of the next span; None where the signal of its input cannot be known."""
        kind, found = self._runtime.blocks[span.first].slot.kind, []
        for row, call in zip(self._rows, self.lineup[-1], strict=True):
            if call.known.extras or call.known.out_dtype != call.x.dtype:
                return None
            following = Call(  # spelled out: `replace` takes ten times as long, and every span comes by here
                step=call.step,
                span=span,
                blocks=call.blocks,
                kind=kind,
                chunk=call.chunk,
                full_action=call.full_action,
                x=call.x,
                pass_input=call.pass_input,
                entry=row.entry(span.first),
                tap=call.tap,
                peer=call.peer,
                prediction=call.prediction,
                view_groups=call.view_groups,
            )
            found.append(following)
        return found

    def _known(self, row: Transaction, calls: Sequence[Call], signal: Signal) -> Run:
        """What is known of these spans in a row, made anew where an entry was."""
        first = calls[0].span.first
        run = row.run(first)
        if run is not None and run.holds_for([call.known.tensors["signal"] for call in calls]):
            return run
        added = [signal.read(replace(call, x=_added(self._runtime, call))) for call in calls[:-1]]
        then = torch.stack([call.known.tensors["signal"] for call in calls])
        change = torch.stack([torch.zeros_like(then[0]), *added]).cumsum(0)
        for call, own in zip(calls, then, strict=True):  # these signals are held once, as rows of all of them
            row.update(call, {}, {"signal": own})
        run = Run(tuple(ref(call.known.tensors["signal"]) for call in calls), then, change)
        row.keep_run(first, run)
        return run


def predict_run(runtime: Runtime, row: Transaction, calls: Sequence[Call]) -> Tensor:
    """The output of several reused spans in a row: what they add is summed once, and kept for the next time."""
    first, x = calls[0].span.first, calls[0].x
    run = row.run(first)
    if run is not None and run.added is not None and run.spans == len(calls):
        return x + run.added
    added = [_added(runtime, call) for call in calls]
    total = sum(added[2:], added[0] + added[1])
    if run is not None:
        row.keep_run(first, replace(run, spans=len(calls), added=total))
    return x + total


def _added(runtime: Runtime, call: Call) -> Tensor:
    """What the predictor adds for a call."""
    assert runtime.policy.predictor is not None
    added = runtime.policy.predictor.added(call.known)
    assert added is not None
    return added

"""What a pass does to the state of each stream it serves.

Nothing a pass learns reaches a stream before the pass ends well. One that fails leaves its streams as they were, except
that slots whose held tensors it had begun to overwrite give them up.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from holdover.engine import condition as conditions
from holdover.engine.contract import Audit, Call, Kept, Policy, Reading, Verdict
from holdover.engine.slots import Block, Span, ViewGroup
from holdover.engine.state import Condition, FullChunk, Held, Key, Run, Stream
from holdover.engine.step import Step
from holdover.engine.trace import WARM_UP, Tally, Trace, place


@dataclass(kw_only=True)
class Runtime:
    """What all passes of an attached model share."""

    policy: Policy
    blocks: Sequence[Block]
    view_groups: tuple[ViewGroup, ...]
    audit: Audit
    max_bytes: int | None
    process_group: dist.ProcessGroup | None
    streams: dict[str, Stream] = field(default_factory=dict)
    tallies: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    trace: Trace = field(default_factory=Trace)
    readings: dict[tuple[torch.Size, torch.device], Reading] = field(default_factory=dict)
    #: By first block, whether the blocks of a span hand on what they return beside the hidden state, all the same kind.
    alike: dict[int, bool] = field(default_factory=dict)
    #: Blocks that the pass in progress need not be asked about and that have not run: whether they are computed.
    settled: dict[int, bool] = field(default_factory=dict)
    warned_barren: bool = False

    def __post_init__(self) -> None:
        spans = self.policy.spans(len(self.blocks))
        assert [b for span in spans for b in range(span.first, span.last + 1)] == list(range(len(self.blocks)))
        self.span_of = [span for span in spans for _ in range(span.first, span.last + 1)]
        self._readings_of = {self.view_groups: self.readings}
        self._runs: dict[tuple[int, int, bool], tuple[dict[int, bool], list[tuple[str, int]]]] = {}

    def settle(self, first: int, last: int, *, computed: bool) -> tuple[Mapping[int, bool], Sequence[tuple[str, int]]]:
        """Ask the pass no more about these blocks, each of which may run once; returns which those are, and labels.

        Whether a call writes the KV cache is asked of every call of a block that can tell.
        """
        key = first, last, computed
        if key not in self._runs:
            found = [block for block in self.blocks[first : last + 1] if block.slot.kv_update is None]
            self._runs[key] = {block.index: computed for block in found}, [block.label for block in found]
        self.settled.update(self._runs[key][0])
        return self._runs[key]

    def lay_out(self, view_groups: tuple[ViewGroup, ...]) -> None:
        """Take tokens to lie so from now on."""
        if view_groups != self.view_groups:
            self.view_groups = view_groups
            self.readings = self._readings_of.setdefault(view_groups, {})

    def splits(self, span: Span) -> bool:
        """Whether rows of a batch can run through a span without the others."""
        return all(block.slot.rows is not None for block in self.blocks[span.first : span.last + 1])

    def reading(self, x: Tensor) -> Reading | None:
        """The policy's signal, prepared for the layout and hidden states like ``x``."""
        if self.policy.signal is None:
            return None
        key = x.shape, x.device
        if key not in self.readings:
            with torch.inference_mode(False):  # what is made here must serve outside inference mode too
                self.readings[key] = self.policy.signal.prepare(x.shape, x.device, self.view_groups)
        return self.readings[key]


class Row:
    """One stream's share of a pass: what it sees, and what will become of its state if the pass ends well."""

    def __init__(self, runtime: Runtime, step: Step) -> None:
        self.runtime, self.step, self.place = runtime, step, place(step)
        if step.stream not in runtime.streams:
            runtime.streams[step.stream] = Stream()
        self.stream = runtime.streams[step.stream]
        chunk, run = self.stream.find(step)
        if run is None and runtime.policy.lifetime == "chunk":
            self.stream.free(step.branch)
        known = self.stream.conditions.get(step.branch)
        self.ordinal = chunk.ordinal if chunk else self.stream.count
        changed = known is not None and known.changed_to(step.condition)
        epoch = (known.epoch if known else 0) + changed
        kept = known is not None and not known.by_digest and not changed
        self.condition = known if known and kept else Condition(epoch, conditions.freeze(step.condition))
        self.begun = run.epoch if run else known.epoch if known else 0
        #: From the pass in which the condition changed, the rest of the chunks in flight is computed in full.
        self.renewed = epoch != self.begun
        self.pending: dict[Key, Held] = {}
        self.overwritten: set[Key] = set()
        #: What the guidance branch that came first in this pass decided, and what this one does, by first block.
        self.led: dict[int, bool] = {}
        if chunk and chunk.shared:
            self.led = {
                block: reused
                for (index, block), (branch, reused) in chunk.shared.items()
                if index == step.index and branch != step.branch
            }
        self.decided: dict[int, bool] = {}
        self.asked = self.reused = self.warm_up = False
        self.reuses = self.stream.reuses
        self.audit_errors: list[float] = []

    def call(
        self,
        span: Span,
        x: Tensor,
        entry: Tensor,
        tap: Callable[[str], Tensor],
        compute: Callable[[Tensor], Tensor],
    ) -> Call:
        return Call(
            step=self.step,
            span=span,
            blocks=len(self.runtime.blocks),
            kind=self.runtime.blocks[span.first].slot.kind,
            chunk=self.ordinal,
            full=self.stream.full.get(self.step.branch),
            x=x,
            entry=entry,
            held=self._known(span.first),
            tap=tap,
            peer=self._known,
            compute=compute,
        )

    def judge(self, call: Call, reading: Reading | None) -> Verdict:
        """Whether the span must be computed: guards first, then the engine's own reasons, then the gate."""
        policy = self.runtime.policy
        led = self.led.get(call.span.first) if policy.one_for_all_branches else None
        reason = "branch" if led is False else policy.guard(call) or self._refusal(call)
        if reason is not None:
            self.warm_up |= reason == WARM_UP
            return Verdict(reason)
        assert call.held is not None
        self.asked = True
        metrics: dict[str, float] = {}
        if reading is not None:
            call.signal = reading.read(call)
            metrics = reading.metrics(reading.compare(call.signal, call.held.tensors["signal"]).tolist())
            if not all(map(math.isfinite, metrics.values())):
                return Verdict("nan", metrics)
        verdict = policy.gate.judge(call, metrics)
        if verdict.numbers:
            self._update(call, Kept(numbers=verdict.numbers))
        return verdict._replace(reason=None) if led else verdict

    def prepare(self, call: Call, reading: Reading | None) -> None:
        """Before a span is computed: read the signal that will be held with it."""
        if reading is not None and self._has_room(call):
            call.signal = reading.read(call)

    def reuse(self, call: Call, y: Tensor) -> None:
        """After the predictor stood in with ``y``."""
        policy = self.runtime.policy
        assert policy.predictor is not None
        self._update(call, policy.predictor.reused(call, y))
        if policy.signal is not None and policy.signal.follows and call.signal is not None:
            self._update(call, Kept({"signal": call.signal.detach()}))

    def remember(self, call: Call, y: Tensor, extras: dict[int, tuple[Any, ...]]) -> None:
        """After a span was computed: hold what it did, if it fits."""
        predictor = self.runtime.policy.predictor
        assert predictor is not None
        if not self._has_room(call):
            return
        key, y = self._key(call.span.first), y.detach()
        old = self.pending.get(key) or self.stream.held.get(key)
        held = self.pending[key] = Held(
            numbers=self.runtime.policy.gate.learn(call, y),
            chunk=self.ordinal,
            epoch=self.condition.epoch,
            action=self.step.action_vector,
            shape=call.x.shape,
            dtype=call.x.dtype,
            device=call.x.device,
            out_dtype=y.dtype,
            void="shape" if predictor.adds and y.shape != call.x.shape else None,
        )
        if held.void is None:
            spare = old.tensors if old and not old.shared else {}
            if spare:
                self.overwritten.add(key)
            held.tensors.update(predictor.remember(call, y, spare))
            if extras:
                held.extras = {block: tuple(map(_kept, items)) for block, items in extras.items()}
            if call.signal is not None:
                held.tensors["signal"] = call.signal.detach()
        grown = held.nbytes - (old.nbytes if old else 0)
        if self.runtime.max_bytes is not None and self.stream.nbytes + grown > self.runtime.max_bytes:
            grown -= held.nbytes
            self.pending[key] = held.voided("bytes")
        self.stream.nbytes += grown

    def draw_audit(self) -> bool:
        """Whether this reused span is in the audit's sample: its number decides, so a restored stream draws alike."""
        self.reused = True
        self.reuses += 1
        audit = self.runtime.audit
        if audit.rate == 0:
            return False
        draw = random.Random(f"{audit.seed} {self.step.stream} {self.step.branch} {self.reuses}").random()
        return draw < audit.rate

    def commit(self) -> None:
        step, stream = self.step, self.stream
        chunk = stream.open(step)
        chunk.asked |= self.asked
        chunk.warm_up |= self.warm_up
        run = chunk.runs.setdefault(step.branch, Run(step.num_steps, step.action_vector, self.begun))
        run.indices.add(step.index)
        run.exact &= not self.reused
        for other in stream.chunks.values():
            if step.branch in other.runs:
                other.runs[step.branch].idle += 1
        run.idle = 0
        for block, reused in self.decided.items():
            if self.runtime.policy.one_for_all_branches and block not in self.led:
                chunk.shared[step.index, block] = step.branch, reused
        if run.exact and len(run.indices) == step.num_steps:
            stream.full[step.branch] = FullChunk(chunk.ordinal, step.action_vector)
        stream.conditions[step.branch] = self.condition
        stream.held.update(self.pending)
        stream.reuses = self.reuses

    def roll_back(self) -> None:
        for key in self.overwritten:
            old = self.stream.held.get(key)
            if old is not None and old.tensors:
                self.stream.held[key] = old.voided("interrupted")
        self.stream.nbytes = sum(held.nbytes for held in self.stream.held.values())

    def _refusal(self, call: Call) -> str | None:
        """The engine's own reasons to compute."""
        held = call.held
        if self.renewed:
            return "condition"
        if held is None:
            return "first"
        if held.void is not None:
            return held.void
        if held.epoch != self.condition.epoch:
            return "condition"
        if held.shape != call.x.shape:
            return "shape"
        if held.dtype != call.x.dtype:
            return "dtype"
        if held.device != call.x.device:
            return "device"
        return "audit" if self.stream.alarmed else None

    def _update(self, call: Call, kept: Kept) -> None:
        """Change what is remembered of a span that was not computed."""
        assert call.held is not None
        if not kept.numbers and not kept.tensors:
            return
        held = call.held.updated(kept.numbers, kept.tensors)
        if kept.tensors:
            self.stream.nbytes += held.nbytes - call.held.nbytes
        call.held = self.pending[self._key(call.span.first)] = held

    def _known(self, block: int, branch: str | None = None) -> Held | None:
        """What is remembered of the span that begins at a block."""
        key = self._key(block, branch)
        return self.pending.get(key) or self.stream.held.get(key)

    def _key(self, block: int, branch: str | None = None) -> Key:
        policy = self.runtime.policy
        return Key(
            self.step.branch if branch is None else branch,
            self.ordinal if policy.lifetime == "chunk" else None,
            self.step.index if policy.per_index else None,
            block,
        )

    def _has_room(self, call: Call) -> bool:
        if self.runtime.max_bytes is None:
            return True
        held = self.stream.held.get(self._key(call.span.first))
        return held is None or held.void != "bytes"


def _kept(item: Any) -> Any:
    return item.detach().clone() if isinstance(item, Tensor) else item

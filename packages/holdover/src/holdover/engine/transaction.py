"""What a pass does to one stream, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from holdover.engine import condition as conditions
from holdover.engine.streams import BranchRun, Condition, Key, Run, Stream
from holdover.engine.trace import place
from holdover.method import Call, Entry, Policy
from holdover.step import Step


class Transaction:
    """One row's share of a pass: what it sees of its stream, and what becomes of the stream if the pass ends well.

    A pass that fails leaves its stream as it was, except that entries give up tensors that were overwritten already.
    """

    def __init__(self, streams: dict[str, Stream], policy: Policy, max_bytes: int | None, step: Step) -> None:
        self.step, self.place = step, place(step)
        self._streams, self._is_new = streams, step.stream not in streams
        if self._is_new:
            streams[step.stream] = Stream()
        self.stream = streams[step.stream]
        self.full_action = self.stream.full_actions.get(step.branch)
        self.asked = self.reused = self.warm_up = False  # what happened in the pass
        self.audit_errors: list[float] = []
        self.reuses = self.stream.reuses
        self._policy, self._max_bytes = policy, max_bytes
        #: How many spans to decide at once in this pass.
        self.reach = self.stream.reach.get((step.branch, step.index), policy.look_ahead)
        chunk, run = self.stream.find(step)
        if run is None and policy.lifetime == "chunk":
            self.stream.free(step.branch)
        self.ordinal = chunk.ordinal if chunk else self.stream.count
        known = self.stream.conditions.get(step.branch)
        changed = known is not None and known.changed_to(step.condition)
        epoch = (known.epoch if known else 0) + changed
        unchanged = known is not None and not known.by_digest and not changed
        self.condition = known if known and unchanged else Condition(epoch, conditions.freeze(step.condition))
        # Nothing of a chunk before it is there to be reused where entries serve one chunk alone.
        before = epoch if policy.lifetime == "chunk" or known is None else known.epoch
        self._begun = run.epoch if run else before
        #: Once the condition has changed, the rest of the chunks in flight is computed in full.
        self.renewed = epoch != self._begun
        #: What the guidance branch that came first in this pass decided, by first block, and what this one decides.
        self.led: dict[int, bool] = {}
        self.decided: dict[int, bool] = {}
        #: The latent frames that were not computed.
        self.drafts: set[int] = set()
        if chunk is not None and chunk.shared:
            self.led = {
                block: reused
                for (index, block), (branch, reused) in chunk.shared.items()
                if index == step.index and branch != step.branch
            }
        self._pending: dict[Key, Entry] = {}
        self._runs: dict[Key, Run] = {}
        self._overwritten: set[Key] = set()

    def entry(self, block: int, branch: str | None = None) -> Entry | None:
        """The entry of the span that begins at a block, this pass included; or of that span in another branch."""
        key = self._key(block, branch)
        return self._pending.get(key) or self.stream.entries.get(key)

    def run(self, block: int) -> Run | None:
        """What is known of the spans in a row that begin at a block."""
        key = self._key(block)
        return self._runs.get(key) or self.stream.runs.get(key)

    def keep_run(self, block: int, run: Run) -> None:
        """Keep what is known of the spans in a row that begin at a block, if it fits."""
        old = self.run(block)
        grown = run.nbytes - (old.nbytes if old else 0)
        if self._max_bytes is None or self.stream.nbytes + grown <= self._max_bytes:
            self._runs[self._key(block)] = run
            self.stream.nbytes += grown

    def ran_on(self, reused: int, asked: int) -> None:
        """So many of the spans that were decided at once were reused: look further ahead next time, or less far."""
        self.reach = min(2 * self.reach, self._policy.look_ahead) if reused == asked else max(1, reused)

    def refusal(self, call: Call) -> str | None:
        """The engine's own reasons to compute a span."""
        entry = call.entry
        if self.renewed:
            return "condition"
        if entry is None:
            return "first"
        if entry.void is not None:
            return entry.void
        if entry.epoch != self.condition.epoch:
            return "condition"
        if entry.shape != call.x.shape:
            return "shape"
        if entry.dtype != call.x.dtype:
            return "dtype"
        if entry.device != call.x.device:
            return "device"
        return "audit" if self.stream.alarmed else None

    def has_room(self, call: Call) -> bool:
        """Whether the span's entry may fit under the cap; one that did not fit is not tried again."""
        if self._max_bytes is None:
            return True
        entry = self.stream.entries.get(self._key(call.span.first))
        return entry is None or entry.void != "bytes"

    def update(self, call: Call, numbers: Mapping[str, float], tensors: Mapping[str, Tensor] = {}) -> None:
        """Change the entry of a span that was not computed."""
        self._replace(call, call.known.updated(numbers, tensors))

    def open_memory(self, call: Call, block: int) -> Mapping[str, Tensor]:
        """What an entry remembers of a block, to be written into; if the pass fails, the entry is given up."""
        held = call.known.memory.get(block, {})
        if call.known.shared:
            return {name: tensor.clone() for name, tensor in held.items()}
        self._overwritten.add(self._key(call.span.first))
        return {name: _writable(tensor) for name, tensor in held.items()}

    def update_memory(self, call: Call, memory: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Change what an entry remembers of tokens, after a part of the span was computed."""
        entry = call.known.updated({}, {})
        entry.memory = {**entry.memory, **memory}
        if entry.shared:  # the memory is this stream's own from now on, so the rest is made so
            for block in entry.memory.keys() - memory.keys():
                entry.memory[block] = {name: tensor.clone() for name, tensor in entry.memory[block].items()}
            entry.tensors = {name: tensor.clone() for name, tensor in entry.tensors.items()}
            entry.shared = False
        self._replace(call, entry)

    def hold(
        self,
        call: Call,
        y: Tensor,
        beside: Mapping[str, Tensor],
        extras: Mapping[int, tuple[Any, ...]],
        memory: Mapping[int, Mapping[str, Tensor]],
        left_out: tuple[int, ...],
    ) -> None:
        """After a span turned ``call.x`` into ``y``: make its entry, if it fits; ``beside`` are tensors for it."""
        predictor, trigger = self._policy.predictor, self._policy.trigger
        assert predictor is not None
        if not self.has_room(call):
            return
        key, y = self._key(call.span.first), y.detach()
        old = self._pending.get(key) or self.stream.entries.get(key)
        entry = Entry(
            numbers=trigger.learn(call, y),
            chunk=self.ordinal,
            epoch=self.condition.epoch,
            action=self.step.told,
            shape=call.x.shape,
            dtype=call.x.dtype,
            device=call.x.device,
            out_dtype=y.dtype,
            left_out=left_out,
            void="shape" if predictor.adds and y.shape != call.x.shape else None,
        )
        self._pending[key] = entry
        if entry.void is None:
            spare = old.tensors if old and not old.shared else {}
            if spare:
                self._overwritten.add(key)
            entry.tensors.update(predictor.remember(call, y, spare))
            entry.tensors.update(beside)
            entry.extras = {block: tuple(map(_copied, items)) for block, items in extras.items()}
            entry.memory = memory
        grown = entry.nbytes - (old.nbytes if old else 0)
        if self._max_bytes is not None and self.stream.nbytes + grown > self._max_bytes:
            grown -= entry.nbytes
            self._pending[key] = entry.voided("bytes")
        self.stream.nbytes += grown

    def count_reuses(self, spans: int) -> None:
        """Note that spans were reused."""
        self.reused = True
        self.reuses += spans

    def commit(self) -> None:
        """The pass ended well: what it did becomes the stream's."""
        step, stream = self.step, self.stream
        chunk = stream.open(step)
        chunk.asked |= self.asked
        chunk.warm_up |= self.warm_up
        run = chunk.runs.get(step.branch)
        if run is None:
            run = chunk.runs[step.branch] = BranchRun(step.num_steps, step.told, self._begun)
        run.indices.add(step.index)
        run.exact &= not self.reused
        run.latest = stream.passes[step.branch] = stream.passes.get(step.branch, 0) + 1
        run.drafts |= self.drafts
        if self._policy.one_for_all_branches:
            for block, reused in self.decided.items():
                if block not in self.led:
                    chunk.shared[step.index, block] = step.branch, reused
        if run.exact and len(run.indices) == step.num_steps:
            stream.full_actions[step.branch] = step.told
        stream.conditions[step.branch] = self.condition
        stream.entries.update(self._pending)
        stream.runs.update(self._runs)
        stream.reuses = self.reuses
        if self._policy.look_ahead > 1:
            stream.reach[step.branch, step.index] = self.reach
        if self._policy.lifetime == "chunk" and len(run.indices) == run.num_steps:
            stream.end(chunk)

    def roll_back(self) -> None:
        """The pass failed, or the model did not run."""
        stream = self.stream
        if self._is_new and self._streams.get(self.step.stream) is stream:
            del self._streams[self.step.stream]
        for key in self._overwritten:
            old = stream.entries.get(key)
            if old is not None and old.tensors:
                stream.entries[key] = old.voided("interrupted")
        stream.count_bytes()

    def _replace(self, call: Call, entry: Entry) -> None:
        assert call.entry is not None
        if entry.tensors is not call.entry.tensors or entry.memory is not call.entry.memory:
            self.stream.nbytes += entry.nbytes - call.entry.nbytes
        call.entry = self._pending[self._key(call.span.first)] = entry

    def _key(self, block: int, branch: str | None = None) -> Key:
        policy = self._policy
        return Key(
            self.step.branch if branch is None else branch,
            self.ordinal if policy.lifetime == "chunk" else None,
            self.step.index if policy.per_index else None,
            block,
        )


def _writable(tensor: Tensor) -> Tensor:
    """A tensor that can be written into: itself, unless it was made in inference mode, which is over."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def _copied(item: Any) -> Any:
    return item.detach().clone() if isinstance(item, Tensor) else item

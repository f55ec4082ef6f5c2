"""What all passes of one attached policy share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from holdover.decision import WINDOW
from holdover.engine.audit import Audit
from holdover.engine.blocks import Block
from holdover.engine.hooks import Shortcuts
from holdover.engine.streams import Stream
from holdover.engine.trace import Note, Tally, Trace, place
from holdover.method import Policy, Predictor, Signal, Span
from holdover.slot import ViewGroup, by_token
from holdover.step import Step

#: Of how many streams that were reset the counts are kept apart.
TALLIES = 1000


@dataclass(kw_only=True)
class Runtime:
    """One policy on one model.

    Attributes:
        innermost: no other policy is attached inside of this one.
        alike: by first block, whether the blocks of a span hand on what they return beside the hidden state. The last
            block's extras then stand for all.
        shortcuts: the blocks that the pass in progress need not be asked about.
    """

    policy: Policy
    blocks: Sequence[Block]
    view_groups: tuple[ViewGroup, ...]
    audit: Audit
    max_bytes: int | None
    process_group: dist.ProcessGroup | None
    trace: Trace
    innermost: bool = True
    streams: dict[str, Stream] = field(default_factory=dict)
    tallies: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    alike: dict[int, bool] = field(default_factory=dict)
    shortcuts: Shortcuts = field(default_factory=Shortcuts)
    warned_barren: bool = False
    warned_gradients: bool = False
    warned_empty: bool = False

    def __post_init__(self) -> None:
        self.spans = list(self.policy.spans(len(self.blocks)))
        assert [b for span in self.spans for b in range(span.first, span.last + 1)] == list(range(len(self.blocks)))
        signal, predictor = self.policy.trigger.signal, self.policy.predictor
        self.follows = signal is not None and signal.follows
        #: Whether an entry changes when its span is reused.
        self.changed_by_reuse = self.follows or getattr(type(predictor), "reused", None) is not Predictor.reused
        self.span_of = [span for span in self.spans for _ in range(span.first, span.last + 1)]
        self._place_of = {span.first: n for n, span in enumerate(self.spans)}
        self._signals: dict[tuple[torch.Size, torch.device], Signal] = {}
        self._signals_of = {self.view_groups: self._signals}
        for span in self.spans:
            for block in self.blocks_of(span):
                if block.slot.kind in self.policy.parts and block.slot.part is None:
                    raise ValueError(
                        f"{self.policy.name} computes parts of blocks, and block {block.name!r} does not say how; "
                        f"give holdover.Slot({block.name!r}, part=...)"
                    )

    def fold_tallies(self) -> None:
        """Bound the counts of streams that were reset: the oldest are counted together, without a name."""
        gone = [name for name in self.tallies if name and name not in self.streams]
        for name in gone[: -TALLIES or None]:
            self.tallies[""].add(self.tallies.pop(name))

    def hold(self, chunk: int, num_steps: int, stream: str, branches: Sequence[str]) -> None:
        """Note a chunk of a stream that runs no pass."""
        self.streams[stream].hold(chunk, stream)
        labels = [block.label for block in self.blocks]
        steps = [Step(chunk=chunk, index=i, num_steps=num_steps, stream=stream) for i in range(num_steps)]
        places = [replace(place(step), branch=branch) for step in steps for branch in branches]
        self.trace.extend(Note(at, labels, False, WINDOW, {}) for at in places)
        if self.innermost:
            self.tallies[stream].held_chunks += 1

    def lay_out(self, view_groups: tuple[ViewGroup, ...]) -> None:
        """Take tokens to lie so from now on."""
        if view_groups != self.view_groups:
            self.view_groups = view_groups
            self._signals = self._signals_of.setdefault(view_groups, {})

    @property
    def reads_layout(self) -> bool:
        """Whether the policy looks at the view groups."""
        trigger = self.policy.trigger
        return trigger.by_frame or (trigger.signal is not None and trigger.signal.reads_layout)

    def blocks_of(self, span: Span) -> Sequence[Block]:
        return self.blocks[span.first : span.last + 1]

    def splits(self, span: Span) -> bool:
        """Whether rows of a batch can run through a span without the others."""
        return self.innermost and all(block.slot.rows is not None for block in self.blocks_of(span))

    def remembers(self, block: Block) -> bool:
        """Whether a block, when computed, also gives the memory that parts of it need later."""
        return block.slot.kind in self.policy.parts and block.slot.part not in (None, by_token)

    def spans_after(self, span: Span, spans: int) -> Sequence[Span]:
        """The spans that may be decided together with this one, so many with it."""
        if spans == 1 or self.audit.rate > 0 or self.process_group is not None:
            return ()
        at = self._place_of[span.first] + 1
        ahead = self.spans[at : at + spans - 1]
        probe = next((n for n, span in enumerate(ahead) if span.computed is not None), len(ahead))
        return ahead[:probe]

    def signal(self, x: Tensor) -> Signal | None:
        """The policy's signal, prepared for the layout and hidden states like ``x``."""
        signal = self.policy.trigger.signal
        if signal is None:
            return None
        key = x.shape, x.device
        if key not in self._signals:
            with torch.inference_mode(False):  # what is made here must serve outside inference mode too
                self._signals[key] = signal.prepare(x.shape, x.device, self.view_groups)
        return self._signals[key]

"""What the engine asks of a policy and its parts.

A policy is frozen. Whatever a method remembers lies in `Held` (per slot) and in the record of the latest full
chunk (per branch), which the engine keeps, rolls back when a pass fails, forks and writes to snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from holdover.engine.slots import Kind, Level, Span, ViewGroup
from holdover.engine.state import FullChunk, Held
from holdover.engine.step import Step


class Peer(Protocol):
    def __call__(self, block: int, branch: str | None = None) -> Held | None: ...


@dataclass(slots=True, kw_only=True)
class Call:
    """A span about to run in a denoising pass of one stream.

    Attributes:
        step: where the pass stands.
        span: the blocks in question, of ``blocks`` in all; ``kind`` is what the first of them is.
        chunk: distinct chunks of the stream before this one, since its reset.
        full: the latest chunk of this branch that was computed in full, before this one; None if there is none.
        x: the hidden state that enters the span, ``[B, ..., C]``.
        entry: the hidden state that entered the pass's first block; ``x`` itself for policies that do not read it.
        held: what is remembered of the span; None if nothing.
        tap: a tensor that the span's first slot declares by name, such as its timestep-modulated input.
        peer: what is remembered of the span that begins at a block, this pass included; or of that span in another
            guidance branch, up to its latest pass.
        compute: what the span's first block gives for another hidden state, its other arguments unchanged.
        signal: the policy's signal of this call, once read.
    """

    step: Step
    span: Span
    blocks: int
    kind: Kind
    chunk: int
    full: FullChunk | None
    x: Tensor
    entry: Tensor
    held: Held | None
    tap: Callable[[str], Tensor]
    peer: Peer
    compute: Callable[[Tensor], Tensor]
    signal: Tensor | None = None


class Verdict(NamedTuple):
    """``reason`` to compute, or None to reuse; the scores behind it, and numbers the gate keeps with the slot."""

    reason: str | None
    scores: Mapping[str, float] = {}
    numbers: Mapping[str, float] = {}


class Kept(NamedTuple):
    """What to remember beside, or in place of, what is held under the same names."""

    tensors: Mapping[str, Tensor] = {}
    numbers: Mapping[str, float] = {}


class Guard(Protocol):
    """Forces computation."""

    def __call__(self, call: Call) -> str | None:
        """The reason to compute, or None."""
        ...


class Reading(Protocol):
    """A signal prepared for one shape and device."""

    def read(self, call: Call) -> Tensor:
        """The signal of a call, sharing no memory with the model's tensors."""
        ...

    def compare(self, now: Tensor, then: Tensor) -> Tensor:
        """On the device, all that takes many elements: a few numbers, one-dimensional, which the engine reads once."""
        ...

    def metrics(self, numbers: Sequence[float]) -> dict[str, float]:
        """On the host, the signal's metrics from these numbers, by name."""
        ...


class Signal(Protocol):
    """What a gate looks at.

    ``follows``: it is compared with that of the latest pass, be that computed or not; else with that of the pass in
    which the span was last computed. ``reads_layout``: it looks at the view groups, which the model must then be asked
    for.
    """

    @property
    def follows(self) -> bool: ...
    @property
    def reads_layout(self) -> bool: ...

    def prepare(self, shape: torch.Size, device: torch.device, view_groups: tuple[ViewGroup, ...]) -> Reading:
        """Precompute what reading takes; the engine keeps it per shape and device."""
        ...


class Gate(Protocol):
    """Decides where no guard did."""

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict: ...

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        """The numbers to keep after the span turned ``call.x`` into ``y``; ``call.held`` is what was known before."""
        ...


class Predictor(Protocol):
    """Stands in for a span."""

    @property
    def adds(self) -> bool:
        """Whether it adds to what enters, so that what it stands in for must leave in the same shape."""
        ...

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What to hold after the span turned ``call.x`` into ``y``; may write into the ``spare`` tensors of before.

        ``call.held`` is what was known before, its tensors too, so that a history can be moved on. What is held must
        not share memory with ``y``.
        """
        ...

    def predict(self, call: Call) -> Tensor:
        """The span's output for ``call.x``, from what is held."""
        ...

    def reused(self, call: Call, y: Tensor) -> Kept:
        """What to remember after it stood in with ``y``; most remember nothing."""
        ...


class Policy(Protocol):
    """A caching method: spans + signal + gate + predictor + guard. Its repr names every option."""

    @property
    def name(self) -> str: ...
    @property
    def guard(self) -> Guard: ...
    @property
    def gate(self) -> Gate: ...
    @property
    def signal(self) -> Signal | None: ...
    @property
    def predictor(self) -> Predictor | None:
        """None: nothing is remembered and nothing reused."""
        ...

    @property
    def per_index(self) -> bool:
        """Whether each pass index of a chunk has its own state."""
        ...

    @property
    def lifetime(self) -> Literal["stream", "chunk"]:
        """How long what is held may serve."""
        ...

    @property
    def level(self) -> Level:
        """Which slots it is attached to where the user names none."""
        ...

    @property
    def reads_entry(self) -> bool:
        """Whether it reads `Call.entry`."""
        ...

    @property
    def one_for_all_branches(self) -> bool:
        """Whether the guidance branches of a pass follow the one that comes first."""
        ...

    def spans(self, blocks: int) -> Sequence[Span]:
        """Disjoint spans, in order, that together cover a model's blocks."""
        ...


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Compute a sample of the reused spans as well, without changing the output.

    Attributes:
        rate: share of reused spans, 0 to 1.
        limit: relative error in L2 of a span's output past which the engine warns and computes the stream until reset.
        seed: of the sample.
    """

    rate: float = field(kw_only=False)
    limit: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"audit={self.rate} is not a share; pass a rate from 0 to 1")
        if not self.limit > 0:
            raise ValueError(f"limit={self.limit} of the audit is not positive; pass a relative error such as 0.1")

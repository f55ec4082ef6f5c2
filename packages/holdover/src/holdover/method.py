"""The eight concepts of a caching method.

A `Policy` is a method with its options. It cuts a model's blocks into `Span`s. When a span is about to run in a pass,
the engine shows it to the policy as a `Call`, together with the cache `Entry` of that span. The policy's `Trigger`
decides when to compute: its guard may force computation, else it looks at its `Signal` and gives a `Verdict`. Where the
span is not computed, the `Predictor` stands in for it.

All of these are frozen. Whatever a method remembers lies in the entry, which the engine keeps, rolls back when a pass
fails, forks, and writes to snapshots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from holdover.slot import Kind, Level, Prediction, ViewGroup
from holdover.step import Step


@dataclass(frozen=True)
class Span:
    """A run of blocks with one cache entry, ``first`` and ``last`` included.

    ``computed`` is the reason why a span is computed in every pass, such as "probe"; such a span has no entry.
    """

    first: int
    last: int
    computed: str | None = None


@dataclass(slots=True, kw_only=True)
class Entry:
    """What is remembered of one span. It is replaced, not changed, so that a failed pass can be rolled back.

    Attributes:
        tensors: the predictor's tensors and, under ``"signal"``, the signal.
        numbers: the trigger's running numbers.
        extras: per block what it returned beside the hidden state when last computed.
        memory: per block what `Slot.part` needs of the tokens that a later part leaves out, by name.
        chunk: how many chunks of the stream came before the one in which the span was computed.
        epoch: how often the branch's condition had changed by then.
        action: what was told then, as `Step.told`.
        shape, dtype, device: of the hidden state that entered; ``out_dtype``: of the one that left.
        left_out: blocks of the span that the model did not run then.
        void: why nothing can be reused from it, or None.
        shared: another stream may hold the same tensors, so nobody may write into them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    extras: Mapping[int, tuple[object, ...]] = field(default_factory=dict)
    memory: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    chunk: int
    epoch: int
    action: tuple[tuple[float, ...], ...] | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    out_dtype: torch.dtype
    left_out: tuple[int, ...] = ()
    void: str | None = None
    shared: bool = False

    def all_tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds."""
        yield from self.tensors.values()
        for items in self.extras.values():
            yield from (item for item in items if isinstance(item, Tensor))
        for memory in self.memory.values():
            yield from memory.values()

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        if not self.extras and not self.memory:
            return sum([tensor.nbytes for tensor in self.tensors.values()])
        return sum(tensor.nbytes for tensor in self.all_tensors())

    def updated(self, numbers: Mapping[str, float], tensors: Mapping[str, Tensor]) -> Entry:
        """The same with these numbers and tensors in place of those of the same names."""
        return Entry(  # spelled out: `replace` takes several times as long, and every score comes by here
            tensors={**self.tensors, **tensors} if tensors else self.tensors,
            numbers={**self.numbers, **numbers},
            extras=self.extras,
            memory=self.memory,
            chunk=self.chunk,
            epoch=self.epoch,
            action=self.action,
            shape=self.shape,
            dtype=self.dtype,
            device=self.device,
            out_dtype=self.out_dtype,
            left_out=self.left_out,
            void=self.void,
            shared=self.shared,
        )

    def voided(self, reason: str) -> Entry:
        """Its numbers alone: the trigger's numbers outlive the tensors."""
        return replace(self, tensors={}, extras={}, memory={}, void=reason)


@dataclass(slots=True, kw_only=True)
class Call:
    """A span that is about to run in a denoising pass of one stream.

    Attributes:
        step: where the pass stands.
        span: the blocks in question, of ``blocks`` in all. ``kind`` is what the first of them is.
        chunk: how many chunks of the stream came before this one since its reset.
        full_action: what this branch's latest chunk before this one that was computed in full was told, as `Step.told`.
            None if there is no such chunk or it was told nothing.
        x: the hidden state that enters the span, ``[B, ..., C]``.
        pass_input: the hidden state that entered the pass's first block. It is ``x`` itself unless the policy says that
            it ``reads_pass_input``.
        entry: the span's cache entry, None if there is none.
        tap: gives a tensor that the span's first slot declares by name, such as its timestep-modulated input.
        peer: ``peer(block)`` gives the entry of the span that begins at a block, this pass included;
            ``peer(block, branch)`` gives that of another guidance branch.
        signal: the trigger's signal of this call, once read.
        part: the tokens that are computed where the verdict asks for a part of the span, None else.
        prediction: what the span's first slot says that a model as a whole returns.
        view_groups: how the tokens of a latent frame lie; empty where the model does not say.
    """

    step: Step
    span: Span
    blocks: int
    kind: Kind
    chunk: int
    full_action: tuple[tuple[float, ...], ...] | None
    x: Tensor
    pass_input: Tensor
    entry: Entry | None
    tap: Callable[[str], Tensor]
    peer: Callable[..., Entry | None]
    signal: Tensor | None = None
    part: Tensor | None = None
    prediction: Prediction | None = None
    view_groups: tuple[ViewGroup, ...] = ()

    @property
    def known(self) -> Entry:
        """The entry, where the engine has made sure that there is one: in `Trigger.judge` and `Predictor.predict`."""
        assert self.entry is not None
        return self.entry


class Verdict(NamedTuple):
    """What a trigger decided.

    Attributes:
        reason: why the span is computed; None to reuse it.
        scores: the numbers behind the decision, for the trace.
        numbers: numbers to keep in the entry.
        part: with ``reason=None``, the tokens to compute nevertheless, ``int64 [K]`` or ``[B, K]``: see `Slot.part`.
        drafts: the latent frames that the part leaves out, for `Cache.drafts`.
    """

    reason: str | None
    scores: Mapping[str, float] = {}
    numbers: Mapping[str, float] = {}
    part: Tensor | None = None
    drafts: tuple[int, ...] = ()


class Signal:
    """What a trigger looks at, as a tensor.

    ``follows``: the signal is compared with that of the latest pass; else with that of the pass in which the span was
    last computed. ``reads_layout``: it needs the view groups. ``linear``: the signal of ``x + r`` is that of x plus
    that of r, so that the engine can foresee the signals of later spans (`Policy.look_ahead`), and `compare` takes
    several, stacked along a first axis, and returns their numbers ``[K, N]``.
    """

    follows: bool = False
    reads_layout: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    def prepare(self, shape: torch.Size, device: torch.device, view_groups: tuple[ViewGroup, ...]) -> Signal:
        """This signal with all that it precomputes for one shape and device; the engine keeps it."""
        return self

    def read(self, call: Call) -> Tensor:
        """The signal of a call. It shares no memory with the model's tensors."""
        raise NotImplementedError

    def compare(self, now: Tensor, then: Tensor) -> Tensor:
        """On the device, everything that takes many elements: a few numbers ``[N]``, which the engine reads at once."""
        raise NotImplementedError

    def metrics(self, numbers: Sequence[float]) -> dict[str, float]:
        """On the host, the metrics from these numbers, by name."""
        raise NotImplementedError


#: A reason to compute a span, asked before anything is read; None for no objection.
Guard = Callable[[Call], str | None]


def no_guard(call: Call) -> str | None:
    """Never objects."""
    return None


@dataclass(frozen=True, kw_only=True)
class Trigger(ABC):
    """When a span is computed: the guard may force it, else `judge` decides by the signal's metrics.

    ``by_frame``: it tells latent frames apart, so that a model without view groups is refused.
    """

    by_frame: ClassVar[bool] = False
    guard: Guard = no_guard
    signal: Signal | None = None

    @abstractmethod
    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        """Compute, reuse, or compute a part. It is asked where `Call.known` holds something that can be reused."""

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        """The numbers to keep after the span turned ``call.x`` into ``y``; ``call.entry`` is what was known before."""
        return call.entry.numbers if call.entry else {}


@dataclass(frozen=True)
class Predictor(ABC):
    """What stands in for a span.

    ``adds``: it adds to what enters, so that a span which changes the shape cannot be reused.
    """

    adds: ClassVar[bool] = True

    @abstractmethod
    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to hold after the span turned ``call.x`` into ``y``.

        ``call.entry`` is what was known before, so that a history can go on. The tensors must not share memory with
        ``y``. They may be written into the ``spare`` tensors, which are free.
        """

    @abstractmethod
    def predict(self, call: Call) -> Tensor:
        """The span's output for ``call.x``, from the entry."""

    def added(self, entry: Entry) -> Tensor | None:
        """What it adds to whatever enters, if that is all that it does: looking ahead takes this. By default None."""
        return None

    def reused(self, call: Call, y: Tensor) -> Mapping[str, Tensor | float]:
        """What to keep in the entry after ``y`` stood in for the span's output. By default nothing."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A caching method with its options. Its repr names every option.

    Attributes:
        name: of the method.
        spans: cuts that many blocks into disjoint spans, in order, that together cover them.
        trigger: when a span is computed.
        predictor: what stands in for it; None for a policy that computes everything.
        per_index: each pass index of a chunk has entries of its own.
        lifetime: an entry serves the whole ``stream``, or the ``chunk`` in which it was computed. Chunks in flight keep
            their own.
        level: the slots are a model's ``block``s, the ``sublayer``s within these, or the ``model`` as a whole.
        reads_pass_input: trigger or predictor read `Call.pass_input`.
        one_for_all_branches: guidance branches keep entries of their own and share the first one's decision.
        parts: the kinds of slots of which the trigger may compute a part. Each such slot declares `Slot.part`.
        guided: the guidance branches that it tells from each other, each with a pass or a row of its own.
        look_ahead: how many spans are decided at once, from the input of the first. It takes a linear signal.
    """

    name: str
    spans: Callable[[int], Sequence[Span]]
    trigger: Trigger
    predictor: Predictor | None = None
    per_index: bool = False
    lifetime: Literal["stream", "chunk"] = "stream"
    level: Level = "block"
    reads_pass_input: bool = False
    one_for_all_branches: bool = False
    parts: tuple[Kind, ...] = ()
    look_ahead: int = 1
    guided: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        signal, predictor = self.trigger.signal, type(self.predictor)
        foresees = signal is not None and signal.linear and getattr(predictor, "added", None) is not Predictor.added
        if self.look_ahead < 1 or (self.look_ahead > 1 and not foresees):
            raise ValueError(f"look_ahead={self.look_ahead} of {self.name}: give 1, or more where the signal is linear")

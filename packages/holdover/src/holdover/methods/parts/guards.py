"""Guards force computation. They combine: ``a | b`` where either does, ``a & b`` where both do."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from holdover.engine.contract import Call
from holdover.engine.trace import WARM_UP


class Guard:
    """The reason to compute a span, or None."""

    @abstractmethod
    def __call__(self, call: Call) -> str | None: ...

    def __or__(self, other: Guard) -> AnyOf:
        return AnyOf((self, other))

    def __and__(self, other: Guard) -> AllOf:
        return AllOf((self, other))


@dataclass(frozen=True)
class AnyOf(Guard):
    """Computes where any of its guards does, for the reason of the first that does."""

    guards: tuple[Guard, ...]

    def __call__(self, call: Call) -> str | None:
        for guard in self.guards:
            reason = guard(call)
            if reason is not None:
                return reason
        return None

    def __or__(self, other: Guard) -> AnyOf:
        return AnyOf((*self.guards, other))


@dataclass(frozen=True)
class AllOf(Guard):
    """Computes where all of its guards do, for the reason of the first."""

    guards: tuple[Guard, ...]

    def __call__(self, call: Call) -> str | None:
        reasons = [guard(call) for guard in self.guards]
        return None if None in reasons else reasons[0]


@dataclass(frozen=True)
class Always(Guard):
    """Computes everything."""

    reason: str

    def __call__(self, call: Call) -> str | None:
        return self.reason


@dataclass(frozen=True)
class WarmUp(Guard):
    """Computes the first ``warmup`` chunks of a stream."""

    warmup: int

    def __post_init__(self) -> None:
        _at_least("warmup", self.warmup, 0)

    def __call__(self, call: Call) -> str | None:
        return WARM_UP if call.chunk < self.warmup else None


#: Which passes KV protection computes: the whole chunk whose latents are committed, or the clean pass alone, which
#: the engine computes anyway.
Protection = Literal["chunk", "pass"]


@dataclass(frozen=True)
class KVProtection(Guard):
    """Computes the chunk whose latents the KV update writes, every block at every step."""

    def __call__(self, call: Call) -> str | None:
        return "kv cycle" if call.step.commits else None


@dataclass(frozen=True)
class Anchors(Guard):
    """Computes the first and the last blocks."""

    front_anchors: int
    back_anchors: int

    def __post_init__(self) -> None:
        _at_least("front_anchors", self.front_anchors, 0)
        _at_least("back_anchors", self.back_anchors, 0)

    def __call__(self, call: Call) -> str | None:
        anchored = call.span.first < self.front_anchors or call.span.last >= call.blocks - self.back_anchors
        return "anchor" if anchored else None


@dataclass(frozen=True)
class FirstStep(Guard):
    """Computes the first denoising pass of a chunk."""

    def __call__(self, call: Call) -> str | None:
        return "step 0" if call.step.index == 0 else None


@dataclass(frozen=True)
class FirstSteps(Guard):
    """Computes the first passes of a chunk, by number or as a share of them, rounded down."""

    first: int | float

    def __post_init__(self) -> None:
        whole = isinstance(self.first, int) and self.first >= 0
        if not whole and not (isinstance(self.first, float) and 0 <= self.first <= 1):
            raise ValueError(
                f"retain={self.first!r}: give a whole number of first steps, or a share of the steps from 0.0 to 1.0"
            )

    def __call__(self, call: Call) -> str | None:
        steps = call.step.num_steps
        first = self.first if isinstance(self.first, int) else math.floor(self.first * steps + 1e-9)
        return "retained" if call.step.index < first else None


@dataclass(frozen=True)
class LastStep(Guard):
    """Computes the last pass of a chunk."""

    def __call__(self, call: Call) -> str | None:
        return "last step" if call.step.index == call.step.num_steps - 1 else None


@dataclass(frozen=True)
class Stale(Guard):
    """Computes what would be held over for more than ``max_staleness`` chunks in a row."""

    max_staleness: int

    def __post_init__(self) -> None:
        _at_least("max_staleness", self.max_staleness, 1)

    def __call__(self, call: Call) -> str | None:
        return "stale" if call.held and call.chunk - call.held.chunk > self.max_staleness else None


@dataclass(frozen=True)
class NewAction(Guard):
    """Computes the chunk whose action moved by its scale or more in any dimension.

    It is compared with the action of the latest chunk that was computed in full, so that small changes add up, and
    one answer holds for the whole chunk.

    Attributes:
        scale: change that counts, in the action's units: one number, or one per dimension.
    """

    scale: float | tuple[float, ...]

    def __post_init__(self) -> None:
        scales = (self.scale,) if isinstance(self.scale, int | float) else self.scale
        if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
            raise ValueError(
                f"scale={self.scale} is not positive; give the change of an action that counts, such as 0.05"
            )

    def __call__(self, call: Call) -> str | None:
        action = call.step.action_vector
        if action is None:
            raise ValueError("this policy decides by the action, and the step has none; pass step(action=...)")
        scales = (self.scale,) * len(action) if isinstance(self.scale, int | float) else self.scale
        if len(scales) != len(action):
            raise ValueError(
                f"scale has {len(scales)} dimensions, the action {len(action)}; give one scale per dimension"
            )
        known = call.full.action if call.full else None
        if known is None or len(known) != len(action):
            return "action"
        moved = max(abs(a - b) / scale for a, b, scale in zip(action, known, scales, strict=True))
        return "action" if moved >= 1 else None


@dataclass(frozen=True)
class Interval(Guard):
    """Computes every ``every``-th pass of a chunk, or a slot every ``every`` chunks."""

    every: int
    over: Literal["steps", "chunks"]

    def __post_init__(self) -> None:
        if self.every < 2:
            raise ValueError(f"every={self.every} reuses nothing; give 2 or more, or use never()")
        one_of("over", self.over, ("steps", "chunks"))

    def __call__(self, call: Call) -> str | None:
        if self.over == "steps":
            due = call.step.index % self.every == 0
        else:
            due = call.held is not None and call.chunk - call.held.chunk >= self.every
        return "interval" if due else None


def for_steps(*, retain: int | float, last: bool, protection: Protection) -> AnyOf:
    """The guards of a method that looks from step to step: protection, first steps, last step."""
    one_of("protection", protection, ("chunk", "pass"))
    guards: list[Guard] = [KVProtection()] if protection == "chunk" else []
    first = FirstSteps(retain)  # refuses what is no number of steps
    if retain:
        guards.append(first)
    if last:
        guards.append(LastStep())
    return AnyOf(tuple(guards))


def one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise a ValueError unless an option has one of its values."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number, {least} or more")

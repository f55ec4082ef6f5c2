"""Guards that several methods share: reasons to compute a span, asked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from holdover.decision import WARM_UP
from holdover.method import Call, Guard


@dataclass(frozen=True)
class AnyOf:
    """Computes where any of its guards does, for the reason of the first that does. ``|`` adds one."""

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
class WarmUp:
    """Computes the first ``warmup`` chunks of a stream."""

    warmup: int

    def __post_init__(self) -> None:
        at_least("warmup", self.warmup, 0)

    def __call__(self, call: Call) -> str | None:
        return WARM_UP if call.chunk < self.warmup else None


#: Which passes KV protection computes: the whole chunk whose latents are committed, or the clean pass alone, which
#: the engine computes anyway.
Protection = Literal["chunk", "pass"]


@dataclass(frozen=True)
class KVProtection:
    """Computes the chunk whose latents the KV update writes, every block at every step."""

    def __call__(self, call: Call) -> str | None:
        return "kv cycle" if call.step.commits else None


@dataclass(frozen=True)
class Anchors:
    """Computes the first and the last blocks."""

    front_anchors: int
    back_anchors: int

    def __post_init__(self) -> None:
        at_least("front_anchors", self.front_anchors, 0)
        at_least("back_anchors", self.back_anchors, 0)

    def __call__(self, call: Call) -> str | None:
        anchored = call.span.first < self.front_anchors or call.span.last >= call.blocks - self.back_anchors
        return "anchor" if anchored else None


@dataclass(frozen=True)
class FirstSteps:
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
class LastStep:
    """Computes the last pass of a chunk."""

    def __call__(self, call: Call) -> str | None:
        return "last step" if call.step.index == call.step.num_steps - 1 else None


@dataclass(frozen=True)
class Interval:
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
            due = call.entry is not None and call.chunk - call.entry.chunk >= self.every
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


def at_least(name: str, value: int, least: int) -> None:
    """Raise a ValueError unless an option is a whole number of that size."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number, {least} or more")


def at_least_zero(name: str, value: float) -> None:
    """Raise a ValueError for a negative option, or one that is not a number."""
    if not value >= 0:
        raise ValueError(f"{name}={value} is negative; give 0 or more")


def share_of_steps(name: str, value: float) -> None:
    """Raise a ValueError unless an option is a share."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is not a share of the steps; give 0.0 to 1.0")


def rounded_down(share: float, steps: int) -> int:
    """That share of the steps."""
    return math.floor(share * steps + 1e-9)

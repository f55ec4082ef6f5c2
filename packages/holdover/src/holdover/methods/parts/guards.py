"""Guards that several methods share: reasons to compute a span, asked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from holdover.decision import WARM_UP
from holdover.method import Call, Guard
from holdover.step import Step


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


#: First steps: how many, a share of the steps, rounded down, or a share and a number more.
First = int | float | tuple[float, int]


@dataclass(frozen=True)
class FirstSteps:
    """Computes the first passes of a chunk, by number or as a share of them, rounded down."""

    first: First

    def __post_init__(self) -> None:
        share, more = self.first if isinstance(self.first, tuple) else (self.first, 0)
        whole = isinstance(share, int) and share >= 0
        if (not whole and not (isinstance(share, float) and 0 <= share <= 1)) or not isinstance(more, int) or more < 0:
            raise ValueError(
                f"retain={self.first!r}: give a whole number of first steps, or a share of the steps from 0.0 to 1.0"
            )

    def __call__(self, call: Call) -> str | None:
        step = call.step
        return "retained" if step.index - step.first < self.steps(step.num_steps - step.first) else None

    def steps(self, steps: int, each: int = 1) -> int:
        """How many of so many steps come first; a number counts ``each`` as many times."""
        share, more = self.first if isinstance(self.first, tuple) else (self.first, 0)
        return each * more + (each * share if isinstance(share, int) else rounded_down(share, steps))


@dataclass(frozen=True)
class FirstPasses(FirstSteps):
    """Computes the first passes of a chunk, where each step has a pass for each of these guidance branches.

    A share is of all passes, so that it may end between two branches of one step. A number is of steps.
    """

    branches: tuple[str, ...]

    def __call__(self, call: Call) -> str | None:
        number, passes = counted(call.step, self.branches)
        skipped = call.step.first * len(self.branches)
        return "retained" if number - skipped < self.steps(passes - skipped, len(self.branches)) else None


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


def for_steps(*, retain: First, last: bool, protection: Protection, branches: Sequence[str] = ()) -> AnyOf:
    """The guards of a method that looks from step to step: protection, first steps, last step.

    With ``branches``, first steps are counted in passes: see `FirstPasses`.
    """
    one_of("protection", protection, ("chunk", "pass"))
    guards: list[Guard] = [KVProtection()] if protection == "chunk" else []
    first = FirstPasses(retain, named(branches)) if branches else FirstSteps(retain)  # refuses what is no number
    if retain:
        guards.append(first)
    if last:
        guards.append(LastStep())
    return AnyOf(tuple(guards))


def named(branches: Sequence[str]) -> tuple[str, ...]:
    """Guidance branches, in the order in which they run.

    Raises:
        ValueError: they are not names, or two are the same.
    """
    names = (branches,) if isinstance(branches, str) else tuple(branches)
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"branches={branches!r}: give different names, in the order in which the branches run")
    return names


def counted(step: Step, branches: tuple[str, ...]) -> tuple[int, int]:
    """Which of the chunk's passes a step is, and how many there are, counted over these guidance branches if any.

    Raises:
        ValueError: the step is of another branch.
    """
    if not branches:
        return step.index, step.num_steps
    if step.branch not in branches:
        raise ValueError(
            f"branch={step.branch!r} is not one of branches={branches}; give the names of all guidance branches in the "
            f"order in which they run"
        )
    return step.index * len(branches) + branches.index(step.branch), step.num_steps * len(branches)


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

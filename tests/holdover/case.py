"""A policy with options, beside the naive twin that is to agree with it. Each twin's module lists its own cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import holdover
from tests.holdover.toy import FEW, GROUPS, MANY, ToyLoop

#: The toy's token grids, as twins take them.
TOY_GROUPS = [(group.views, group.height, group.width) for group in GROUPS]


@dataclass(frozen=True)
class Case:
    """A policy with options, and the twin that is to agree with it."""

    name: str
    twin: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    sigmas: tuple[float, ...] = FEW
    known: dict[str, Any] = field(default_factory=dict)
    branches: tuple[str, ...] = ("",)
    loops: type[ToyLoop] = ToyLoop
    #: How far outputs may be from the twin's, relative and absolute, where the two do not add in the same order.
    tolerance: float = 0.0

    def policy(self) -> holdover.Policy:
        return holdover.policy(self.name, **self.options)

    def loop(self, **fields: Any) -> ToyLoop:
        """What it runs in: methods that look from step to step need more than a few."""
        return self.loops(**{"sigmas": self.sigmas, "branches": self.branches} | fields)

    def naive(self) -> Any:
        return self.twin(**self.known, **self.options)

    @property
    def chunks(self) -> int:
        """Enough for it to show all it does, in a golden trace that can be read."""
        return 20 if self.sigmas is FEW else 6

    @property
    def length(self) -> int:
        """Chunks of a run that is compared: some cycles."""
        return 20 if len(self.sigmas) <= len(FEW) else 8

    def protected(self) -> Case:
        """The same under KV protection, which methods from the world without a KV cache have off."""
        return replace(self, options={**self.options, "protection": "chunk"}) if self.sigmas is MANY else self

    @property
    def id(self) -> str:
        """Name and options, but for calibrated numbers, one per step, and token grids."""
        shown = {key: value for key, value in self.options.items() if key not in ("ratios", "grids")}
        return "-".join([self.name, *(f"{key}={value}" for key, value in shown.items())])

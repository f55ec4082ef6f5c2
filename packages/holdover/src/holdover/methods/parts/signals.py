"""Signals that several methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdover.method import Call, Signal


@dataclass(frozen=True)
class RelativeChange(Signal):
    """How far a tensor has moved: the metric ``change`` is ``mean|now - then| / mean|then|``, over all elements.

    Attributes:
        of: the span's ``"input"``, the ``"probe residual"`` (that input less the pass's), or the name of a tap such as
            ``"modulated"``.
        follows: compare with the latest pass; else with the one last computed.
    """

    of: str
    follows: bool = False

    def read(self, call: Call) -> Tensor:
        if self.of == "input":
            return call.x.detach().clone()
        if self.of == "probe residual":
            return (call.x - call.pass_input).detach()
        return call.tap(self.of).detach().clone()

    def compare(self, now: Tensor, then: Tensor) -> Tensor:
        return torch.stack([mean_change(now, then), then.abs().mean(dtype=torch.float32)])

    def metrics(self, numbers: Sequence[float]) -> dict[str, float]:
        """``change``: 0 where nothing moved, infinite where something did that was zero."""
        return {"change": relative(*numbers)}


def mean_change(now: Tensor, then: Tensor) -> Tensor:
    """``mean|now - then|``: differences in the tensors' own precision, their mean in float32."""
    return (now - then).abs_().mean(dtype=torch.float32)


def relative(moved: float, size: float) -> float:
    """``moved / size``: 0 where nothing moved, infinite where something did that was zero."""
    return moved / size if size else math.inf if moved else 0.0

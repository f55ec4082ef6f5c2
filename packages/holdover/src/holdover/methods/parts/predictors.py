"""Predictors that several methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdover.method import Call, Entry, Predictor


@dataclass(frozen=True)
class Residual(Predictor):
    """Adds what a span added when it was last computed: ``y = x + (y_then - x_then)``.

    X-Cache (arXiv 2604.20289), reuse.
    """

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        buffer, x = spare.get("residual"), call.x.detach()
        return {"residual": torch.sub(y, x, out=buffer if buffer is not None and _takes(buffer, x, y) else None)}

    def predict(self, call: Call) -> Tensor:
        return call.x + call.known.tensors["residual"]

    def added(self, entry: Entry) -> Tensor:
        return entry.tensors["residual"]


@dataclass(frozen=True)
class Repeat(Predictor):
    """Repeats what a span gave when it was last computed, whatever enters."""

    adds: ClassVar[bool] = False

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"output": y.clone()}

    def predict(self, call: Call) -> Tensor:
        return call.known.tensors["output"].clone()  # the model may write into what it is given


def before(call: Call) -> Entry | None:
    """The entry, if a history can go on from it: it is there, and for hidden states of the kind that enters now."""
    entry = call.entry
    if entry is None or entry.void is not None:
        return None
    alike = (entry.shape, entry.dtype, entry.device) == (call.x.shape, call.x.dtype, call.x.device)
    return entry if alike else None


def _takes(buffer: Tensor, x: Tensor, y: Tensor) -> bool:
    """Whether ``y - x`` can be written into a buffer."""
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return buffer.shape == y.shape and buffer.dtype == y.dtype == x.dtype and buffer.device == y.device

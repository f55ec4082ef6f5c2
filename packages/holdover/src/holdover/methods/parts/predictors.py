"""Predictors stand in for a span of blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdover.engine.contract import Call, Kept


class Predictor:
    """Stands in for a span."""

    adds: ClassVar[bool] = True

    @abstractmethod
    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    @abstractmethod
    def predict(self, call: Call) -> Tensor: ...

    def reused(self, call: Call, y: Tensor) -> Kept:
        """By default a reuse leaves no trace."""
        return Kept()


@dataclass(frozen=True)
class Residual(Predictor):
    """What a span added when it was last computed, added to what enters now: ``y = x + (y_then - x_then)``.

    X-Cache (arXiv 2604.20289), reuse.
    """

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        buffer, x = spare.get("residual"), call.x.detach()
        return {"residual": torch.sub(y, x, out=buffer if buffer is not None and _takes(buffer, x, y) else None)}

    def predict(self, call: Call) -> Tensor:
        assert call.held is not None
        return call.x + call.held.tensors["residual"]


@dataclass(frozen=True)
class Repeat(Predictor):
    """Repeats what a span gave when it was last computed, whatever enters."""

    adds: ClassVar[bool] = False

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"output": y.clone()}

    def predict(self, call: Call) -> Tensor:
        assert call.held is not None
        return call.held.tensors["output"].clone()  # the model may write into what it is given


def _takes(buffer: Tensor, x: Tensor, y: Tensor) -> bool:
    """Whether ``y - x`` can be written into a buffer."""
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return buffer.shape == y.shape and buffer.dtype == y.dtype == x.dtype and buffer.device == y.device

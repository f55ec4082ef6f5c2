"""Parts of methods that hold over what lies within a block, attention and MLP: PAB and ToCa.

Shape suffixes: B batch, L tokens, C channels, K tokens computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdover.engine.contract import Call, Kept, Verdict
from holdover.methods.parts.gates import Gate, at_least_zero
from holdover.methods.parts.guards import Guard
from holdover.methods.parts.predictors import Repeat


@dataclass(frozen=True)
class Middle(Guard):
    """Computes the steps before and after the middle of a chunk; its ends are shares, rounded down."""

    start: float
    stop: float

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(f"start={self.start}, stop={self.stop}: give shares of the steps, 0 <= start <= stop <= 1")

    def __call__(self, call: Call) -> str | None:
        start, stop = (math.floor(share * call.step.num_steps + 1e-9) for share in (self.start, self.stop))
        return None if start <= call.step.index < stop else "retained"


@dataclass(frozen=True)
class EveryByKind(Guard):
    """Computes a slot every so many passes of a chunk, by its kind; slots of other kinds always."""

    every: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        for kind, every in self.every:
            if not isinstance(every, int) or every < 1:
                raise ValueError(f"{kind}={every!r}: give a whole number of steps, 1 or more")

    def __call__(self, call: Call) -> str | None:
        every = dict(self.every).get(call.kind)
        if every is None:
            return "kind"
        return "interval" if call.step.index % every == 0 else None


@dataclass(frozen=True)
class SomeTokens(Gate):
    """Reuses whatever no guard forbids; notes the share of tokens that are computed nevertheless."""

    fresh: float

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        tokens = call.x.shape[1:-1].numel()
        return Verdict(None, {"recomputed": count(self.fresh, tokens) / tokens} if call.kind == "mlp" else {})


@dataclass(frozen=True, kw_only=True)
class FreshTokens(Repeat):
    """Repeats what a slot gave, but for the tokens with the highest score where it is an MLP: these it computes.

    The score of a token is ``‖y‖ / max‖y‖ + age·n/every``, with y what the slot last gave for it, n the steps since.

    Attributes:
        fresh: share of the tokens, rounded up.
    """

    fresh: float
    age: float
    every: int

    def __post_init__(self) -> None:
        if not 0 <= self.fresh <= 1:
            raise ValueError(f"fresh={self.fresh} is not a share of the tokens; give 0.0 to 1.0")
        at_least_zero("age", self.age)

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = super().remember(call, y, spare)
        if call.kind == "mlp":
            tensors["age"] = torch.zeros(y.shape[:-1], device=y.device).flatten(1)
        return tensors

    def predict(self, call: Call) -> Tensor:
        y = super().predict(call)
        if call.kind == "mlp":
            x_BLC, at_BK = call.x.flatten(1, -2), self._fresh(call)
            at_BKC = at_BK[..., None].expand(-1, -1, y.shape[-1])
            y_BLC = y.flatten(1, -2)
            fresh_BKC = call.compute(x_BLC.gather(1, at_BK[..., None].expand(-1, -1, x_BLC.shape[-1])))
            y = y_BLC.scatter(1, at_BKC, fresh_BKC.to(y.dtype)).reshape(y.shape)
        return y

    def reused(self, call: Call, y: Tensor) -> Kept:
        if call.kind != "mlp":
            return Kept()
        assert call.held is not None
        age_BL = (call.held.tensors["age"] + 1).scatter(1, self._fresh(call), 0.0)
        return Kept({"output": y.detach().clone(), "age": age_BL})

    def _fresh(self, call: Call) -> Tensor:
        """Which tokens are computed, ``[B, K]``."""
        assert call.held is not None
        norm_BL = torch.linalg.vector_norm(call.held.tensors["output"].float(), dim=-1).flatten(1)
        largest_B1 = norm_BL.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        score_BL = norm_BL / largest_B1 + self.age * (call.held.tensors["age"] + 1) / self.every
        chosen_BK: Tensor = score_BL.topk(count(self.fresh, score_BL.shape[1]), dim=1).indices
        return chosen_BK


def count(share: float, tokens: int) -> int:
    """A share of the tokens, rounded up."""
    return math.ceil(share * tokens - 1e-9)

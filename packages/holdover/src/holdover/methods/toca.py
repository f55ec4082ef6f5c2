"""ToCa, token-wise caching (arXiv 2410.05317): between full steps only the tokens that matter most are computed.

Shape suffixes: B batch, L tokens, K tokens computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdover.method import Call, Policy, Trigger, Verdict
from holdover.methods.parts.guards import Interval, Protection, at_least_zero, for_steps
from holdover.methods.parts.predictors import Repeat
from holdover.methods.parts.spans import EachBlock


def toca(
    *,
    every: int = 4,
    fresh: float = 0.07,
    age: float = 0.25,
    retain: int | float = 0,
    protection: Protection = "pass",
) -> Policy:
    """Compute every N-th step in full; in between, the MLPs for a share of the tokens, and repeat the rest.

    The tokens that are computed are those with the highest score: the norm of what the MLP last gave for the token,
    relative to the largest, and ``age`` times the steps since then, relative to N. What they give is held from then on.
    The trace counts such a call as reused and notes the share of tokens that was ``recomputed``.

    The model declares attention modules and MLPs as slots of level ``"sublayer"`` (`holdover.Slot`); of kind ``"mlp"``
    are those that work on each token by itself.

    Left open and chosen here: a score that needs no map of attention weights; the released code's ``"norm"`` is of what
    enters, which is the same for all tokens after a layer norm. Attention is repeated whole. The share is one for all
    layers and steps.

    Args:
        every: N, how many steps apart those are that are computed in full.
        fresh: share of the tokens, rounded up, that an MLP computes in between.
        age: weight of the steps since a token was computed.
        retain: first steps that are computed, by number or, as a float, as a share of the steps.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="toca",
        spans=EachBlock(),
        trigger=TokensByScore(
            guard=for_steps(retain=retain, last=False, protection=protection) | Interval(every, "steps"),
            fresh=fresh,
            age=age,
            every=every,
        ),
        predictor=Aging(),
        lifetime="chunk",
        level="sublayer",
        parts=("mlp",),
    )


@dataclass(frozen=True, kw_only=True)
class TokensByScore(Trigger):
    """Reuses whatever the guard does not forbid; of an MLP it computes the tokens with the highest score.

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

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        if call.kind != "mlp":
            return Verdict(None)
        held = call.known.tensors
        norm_BL = torch.linalg.vector_norm(held["output"].float(), dim=-1).flatten(1)
        largest_B1 = norm_BL.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        score_BL = norm_BL / largest_B1 + self.age * (held["age"] + 1) / self.every
        tokens = score_BL.shape[1]
        count = math.ceil(self.fresh * tokens - 1e-9)
        return Verdict(None, {"recomputed": count / tokens}, part=score_BL.topk(count, dim=1).indices)


@dataclass(frozen=True)
class Aging(Repeat):
    """Repeats what a slot gave, and for an MLP holds how many steps ago each token was computed."""

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = super().remember(call, y, spare)
        if call.kind == "mlp":
            tensors["age"] = torch.zeros(y.shape[:-1], device=y.device).flatten(1)
        return tensors

    def reused(self, call: Call, y: Tensor) -> Mapping[str, Tensor | float]:
        if call.part is None:
            return {}
        age_BL = (call.known.tensors["age"] + 1).scatter(1, call.part, 0.0)
        return {"output": y.detach().clone(), "age": age_BL}

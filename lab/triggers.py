"""What else WorldCache-HTC could recompute by: the ablation of its trigger (arXiv 2603.06331), with one predictor.

The paper names its alternatives and does not define them; these are what the names suggest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from holdover.method import Policy as Contract
from holdover.methods.parts.tokens import CurvatureDrift, TokenCurvature
from holdover.method import Policy

Drift = Callable[[Tensor, Tensor, Tensor], Tensor]


def _size(x_BLC: Tensor) -> Tensor:
    size_BL: Tensor = torch.linalg.vector_norm(x_BLC, dim=-1)
    return size_BL


#: By name, what a chaotic token adds to the drift, given κ and the token as it is and as it was shown last: how far it
#: has moved, how much longer or shorter it has become, each as a share of its length, and its curvature alone.
TRIGGERS: Mapping[str, Drift] = {
    "difference": lambda _, now, shown: _size(now - shown) / _size(shown),
    "norm": lambda _, now, shown: (_size(now) - _size(shown)).abs() / _size(shown),
    "curvature": lambda kappa, _, __: kappa,
}


@dataclass(frozen=True, kw_only=True)
class OtherDrift(TokenCurvature):
    """`TokenCurvature`, except for what its tokens add to the drift."""

    trigger: str

    def drift(self, kappa_BL: Tensor, now_BLC: Tensor, shown_BLC: Tensor) -> Tensor:
        return TRIGGERS[self.trigger](kappa_BL, now_BLC, shown_BLC)


def with_trigger(htc: Contract, trigger: str) -> Policy:
    """A WorldCache-HTC with another trigger: one of `TRIGGERS`, or ``"every N"``, computing every N-th step."""
    assert isinstance(htc, Policy)
    assert isinstance(htc.predictor, TokenCurvature)
    if trigger.startswith("every "):
        return replace(htc, gate=CurvatureDrift(eta=float("inf"), n_max=int(trigger.removeprefix("every ")) - 1))
    own = {field.name: getattr(htc.predictor, field.name) for field in fields(htc.predictor)}
    return replace(htc, predictor=OtherDrift(**own, trigger=trigger))

"""WorldCache-HTC (arXiv 2603.06331): heterogeneous token caching for multi-modal diffusion world models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from holdover.methods.parts.guards import Protection, for_steps
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.tokens import CurvatureDrift, ThreeOutputs, TokenCurvature
from holdover.methods.policy import Policy


def worldcache_htc(
    *,
    stable: float = 0.30,
    chaotic: float = 0.60,
    n_max: int = 2,
    eta: float | None = None,
    drift_reduction: Literal["chaotic", "all"] = "chaotic",
    retain: int | float = 10,
    relative_epsilon: float = 0.0,
    pinned: int | Sequence[int] = 0,
    modalities: Sequence[int] = (),
    protection: Protection = "pass",
) -> Policy:
    """Predict the output of the whole model, each token by the curvature of its path over the last three outputs.

    Tokens whose path hardly bends stay where they are, the next go straight on, the rest go on with damping. Computed
    are the first steps, the last, those before three outputs are known, and those where what the chaotic tokens have
    moved, weighted by their curvature, adds up to ``eta``, or where ``n_max`` steps in a row were predicted. Guidance
    branches keep histories of their own and follow the decision of the first. The last axis of the output is channels.

    The defaults are those for Aether. Voyager: ``chaotic=0.70, n_max=6, eta=3.33, retain=5``.

    Args:
        stable: p_s, share of the tokens, the least curved, that are held.
        chaotic: p_c, share of the tokens that are not chaotic.
        n_max: steps in a row that may be predicted.
        eta: η, of the summed drift. None is 0.5, or 0.2 where ``drift_reduction="all"``; for Voyager 3.33, or 1.0.
        drift_reduction: average the drift over the ``"chaotic"`` tokens, as in the paper, or, as in the released code,
            over ``"all"``, which makes it smaller by the share of chaotic ones.
        retain: warm-up, first steps that are computed, by number or as a share.
        relative_epsilon: keeps tokens that stand still from dominating the drift: ε is 1e-8, as published, and this
            share of the mean squared velocity.
        pinned: tokens of a given condition, which no statistics are taken of: how many first ones, or which.
        modalities: how many tokens each modality has, for quantiles of its own; by default they are pooled.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    if eta is None:
        eta = 0.5 if drift_reduction == "chaotic" else 0.2
    return Policy(
        name="worldcache_htc",
        spans=ProbeAndTail(0),
        guard=for_steps(retain=retain, last=True, protection=protection) | ThreeOutputs(),
        gate=CurvatureDrift(eta=eta, n_max=n_max),
        predictor=TokenCurvature(
            stable=stable,
            chaotic=chaotic,
            n_max=n_max,
            drift_reduction=drift_reduction,
            relative_epsilon=relative_epsilon,
            pinned=pinned if isinstance(pinned, int) else tuple(pinned),
            modalities=tuple(modalities),
        ),
        lifetime="chunk",
        level="model",
        one_for_all_branches=True,
    )

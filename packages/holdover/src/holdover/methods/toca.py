"""ToCa, token-wise caching (arXiv 2410.05317): between full steps only the tokens that matter most are computed."""

from __future__ import annotations

from holdover.methods.parts.guards import Interval, Protection, for_steps
from holdover.methods.parts.spans import EachBlock
from holdover.methods.parts.sublayers import FreshTokens, SomeTokens
from holdover.methods.policy import Policy


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
        guard=for_steps(retain=retain, last=False, protection=protection) | Interval(every, "steps"),
        gate=SomeTokens(fresh),
        predictor=FreshTokens(fresh=fresh, age=age, every=every),
        lifetime="chunk",
        level="sublayer",
    )

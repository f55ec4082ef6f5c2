"""TaylorSeer (arXiv 2503.06923): at fixed intervals compute, in between carry the output on by its differences."""

from __future__ import annotations

from typing import Literal

from holdover.methods.parts.guards import Interval, Protection, for_steps, one_of
from holdover.methods.parts.history import Dated, Taylor
from holdover.methods.parts.spans import EachBlock, ProbeAndTail
from holdover.methods.policy import Policy


def taylorseer(
    *,
    every: int = 5,
    order: Literal[0, 1, 2] = 1,
    span: Literal["all", "block"] = "all",
    retain: int | float = 0,
    protection: Protection = "pass",
) -> Policy:
    """Compute every N-th step of a chunk; in between, forecast the output from the backward differences.

    ``k`` steps after the last computed one, ``y = y0 + Σ Δⁱy·kⁱ / (i!·Nⁱ)`` for i up to the order: exact on lines, not
    on parabolas, because the second backward difference belongs to a point one interval back.

    Left open and chosen here: the steps 0, N, 2N, ... are computed; until enough of them are known, the order is lower;
    where a step is computed out of turn, the differences are divided by the true distance.

    Args:
        every: N, how many steps apart the computed ones are.
        order: how many differences are used; 0 repeats the output.
        span: forecast what ``"all"`` blocks together give, or each ``"block"`` by itself.
        retain: first steps that are computed, by number or, as a float, as a share of the steps.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    one_of("span", span, ("all", "block"))
    return Policy(
        name="taylorseer",
        spans=ProbeAndTail(0) if span == "all" else EachBlock(),
        guard=for_steps(retain=retain, last=False, protection=protection) | Interval(every, "steps"),
        gate=Dated(),
        predictor=Taylor(order),
        lifetime="chunk",
    )

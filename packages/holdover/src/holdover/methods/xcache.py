"""X-Cache (arXiv 2604.20289): cross-chunk block caching for few-step autoregressive world models."""

from __future__ import annotations

from typing import Literal

from holdover.methods.parts.gates import DualMetric
from holdover.methods.parts.guards import (
    Anchors,
    AnyOf,
    FirstStep,
    Guard,
    KVProtection,
    Protection,
    Stale,
    WarmUp,
    one_of,
)
from holdover.methods.parts.predictors import Residual
from holdover.methods.parts.signals import Fingerprint
from holdover.methods.parts.spans import EachBlock
from holdover.methods.policy import Policy


def xcache(
    *,
    front_anchors: int = 1,
    back_anchors: int = 0,
    warmup: int = 1,
    tau_floor: float = 0.97,
    margin: float = 0.02,
    alpha: float = 0.30,
    tau_dev: float = 2.00,
    max_staleness: int | None = None,
    protection: Protection = "chunk",
    step0: Literal["off", "full", "relaxed"] = "off",
    tokens: int = 32,
) -> Policy:
    """Reuse a block's residual from the same pass of an earlier chunk while its input has barely changed.

    The defaults are those of the paper's table of settings.

    Args:
        front_anchors: F_n, first blocks that are always computed.
        back_anchors: B_n, last blocks that are always computed.
        warmup: W, chunks at a stream's start that are computed.
        tau_floor: τ_floor, the least cosine at which a block may be reused.
        margin: m, how far the cosine may fall below its running mean.
        alpha: α, weight of the newest cosine in that mean.
        tau_dev: τ_dev, relative deviation of any sampled element from which on a block is computed.
        max_staleness: M, chunks in a row for which a block may be reused; None for no limit.
        protection: ``"chunk"`` computes every block of a chunk whose latents are committed
            (``Step.commits``); ``"pass"`` protects the clean pass alone, and errors accumulate in the KV cache.
        step0: step-0 protection: ``"full"`` computes each chunk's first pass, ``"relaxed"`` asks for a cosine of
            0.999 there.
        tokens: K, sampled tokens per view.

    Raises:
        ValueError: an option is out of range.
    """
    one_of("protection", protection, ("chunk", "pass"))
    one_of("step0", step0, ("off", "full", "relaxed"))
    guards: list[Guard] = [WarmUp(warmup)]
    if protection == "chunk":
        guards.append(KVProtection())
    guards.append(Anchors(front_anchors, back_anchors))
    if step0 == "full":
        guards.append(FirstStep())
    if max_staleness is not None:
        guards.append(Stale(max_staleness))
    return Policy(
        name="xcache",
        spans=EachBlock(),
        guard=AnyOf(tuple(guards)),
        gate=DualMetric(
            tau_floor=tau_floor, margin=margin, alpha=alpha, tau_dev=tau_dev, strict_first_step=step0 == "relaxed"
        ),
        signal=Fingerprint(tokens),
        predictor=Residual(),
        per_index=True,
    )

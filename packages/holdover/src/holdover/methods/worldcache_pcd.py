"""WorldCache-PCD (arXiv 2603.22286): perception-constrained dynamical caching, built on DiCache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from holdover.engine.contract import Signal
from holdover.engine.slots import ViewGroup
from holdover.methods.parts.flow import Warp
from holdover.methods.parts.guards import Protection
from holdover.methods.parts.probe import Extrapolate, SalientChange, ScheduledAccumulate, steps_after_probe
from holdover.methods.parts.signals import RelativeChange
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.policy import Policy


def worldcache_pcd(
    *,
    threshold: float = 0.08,
    probe: int = 2,
    swd: bool = True,
    beta_s: float = 0.12,
    cfc: bool = True,
    alpha: float = 2.0,
    ats: bool = True,
    beta_d: float | Literal["code"] = 4.0,
    ofa: bool = True,
    gamma: tuple[float, float] = (0.0, 2.0),
    warp: Sequence[ViewGroup] = (),
    retain: int | float = 0.2,
    last: bool = False,
    protection: Protection = "pass",
) -> Policy:
    """Extrapolate the residual of the blocks after the probe while the probe's output has drifted little.

    DiCache with four modules, each of which can be switched off: the drift counts more where the picture has structure
    (SWD), the threshold falls while the input moves (CFC) and rises towards the last steps (ATS), and the residual is
    extrapolated by a least-squares fit (OFA). With none of them and ``probe=1`` it is `dicache`.

    Args:
        threshold: τ₀, of the summed drift.
        probe: m, first blocks that are always computed.
        swd: weigh the drift by ``1 + beta_s·S``, S the channel variance of the probe's output brought to 0..1.
        beta_s: β_s.
        cfc: divide the threshold by ``1 + alpha·v``, v the relative change (L1) of the input.
        alpha: α.
        ats: multiply the threshold by ``1 + beta_d·t/T`` at step t of T.
        beta_d: β_d; ``"code"`` for what the released code makes of the number of steps, 4 at 35.
        ofa: ``γ = <P - P2, P1 - P2> / ‖P1 - P2‖²``; else DiCache's ratio, clipped to 1..2.
        gamma: least and largest γ of OFA; the released code has (0.2, 1.8).
        warp: token grids, such as the model's view groups, along which the residuals follow the motion of the input
            since they were computed; off where there are none.
        retain: first steps that are computed in full, by number or as a share.
        last: compute the last step, which the paper does not.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    signal: Signal = RelativeChange("input", follows=True)
    if swd or cfc:
        signal = SalientChange(beta_s if swd else 0.0)
    extrapolate = Extrapolate(
        gamma="projection" if ofa else "ratio",
        clamp=gamma if ofa else (1.0, 2.0),
        warp=Warp(tuple(warp)) if warp else None,
    )
    return Policy(
        name="worldcache_pcd",
        spans=ProbeAndTail(probe),
        guard=steps_after_probe(probe=probe, retain=retain, last=last, protection=protection),
        gate=ScheduledAccumulate(
            metric="change",
            threshold=threshold,
            alpha=alpha if cfc else None,
            beta_d=beta_d if ats else None,
        ),
        signal=signal,
        predictor=extrapolate,
        lifetime="chunk",
        reads_entry=True,
    )

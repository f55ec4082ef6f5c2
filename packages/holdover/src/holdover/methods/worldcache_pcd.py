"""WorldCache-PCD (arXiv 2603.22286): perception-constrained dynamical caching, built on DiCache.

The notation is that of `holdover.methods.dicache`. Shape suffixes: B batch, F latent frames, N tokens of a frame, C
channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from holdover.method import Call, Policy, Signal, Verdict
from holdover.methods.dicache import Extrapolate, steps_after_probe
from holdover.methods.optical_flow import Warp
from holdover.methods.parts.guards import First, Protection, at_least_zero, counted, named, one_of
from holdover.methods.parts.signals import RelativeChange, relative
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.triggers import Accumulate
from holdover.slot import ViewGroup

#: What SWD weighs the drift by: see `SalientChange`.
Saliency = Literal["variance", "deviation", "token deviation"]

EPSILON = 1e-8

#: The steps for which the released code of WorldCache-PCD was tuned.
STEPS = 35


def worldcache_pcd(
    *,
    threshold: float = 0.08,
    probe: int = 2,
    swd: bool = True,
    beta_s: float = 0.12,
    saliency: Saliency = "variance",
    cfc: bool = True,
    alpha: float = 2.0,
    ats: bool = True,
    beta_d: float | Literal["code"] = 4.0,
    ofa: bool = True,
    gamma: tuple[float, float] = (0.0, 2.0),
    warp: Sequence[ViewGroup] = (),
    retain: First = 0.2,
    last: bool = False,
    branches: Sequence[str] = (),
    protection: Protection = "pass",
) -> Policy:
    """Extrapolate the residual of the blocks after the probe while the probe's output has drifted little.

    DiCache with four modules, each of which can be switched off: the drift counts more where the picture has structure
    (SWD), the threshold falls while the input moves (CFC) and rises towards the last steps (ATS), and the residual is
    extrapolated by a least-squares fit (OFA). With none of them and ``probe=1`` it is `dicache`.

    The presets are those of the released code without its warp: for Cosmos as its README calls it and with the settings
    that the code has where none are given, and for Wan as its README calls it.

    Args:
        threshold: τ₀, of the summed drift.
        probe: m, first blocks that are always computed.
        swd: weigh the drift by ``1 + beta_s·S``, S the saliency of the probe's output brought to 0..1.
        beta_s: β_s.
        saliency: ``"variance"`` over channels, averaged over batch and frames, as in the paper. As in the released code
            for each sample by itself and of the step before: the ``"deviation"`` over frames and channels together, or
            for Wan the ``"token deviation"`` over the channels of each token.
        cfc: divide the threshold by ``1 + alpha·v``, v the relative change (L1) of the input.
        alpha: α.
        ats: multiply the threshold by ``1 + beta_d·t/T`` at step t of T.
        beta_d: β_d; ``"code"`` for what the released code makes of the number of passes: 4 at 35, 5 where each of 35
            steps has two ``branches``.
        ofa: ``γ = <P - P2, P1 - P2> / ‖P1 - P2‖²``; else DiCache's ratio, clipped to 1..2.
        gamma: least and largest γ of OFA; the released code has (0.2, 1.8).
        warp: token grids, such as the model's view groups, along which the residuals follow the motion of the input
            since they were computed; off where there are none.
        retain: first steps that are computed in full: how many, a share of the steps, or a share and a number more.
        last: compute the last step, which the paper does not.
        branches: guidance branches in the order in which they run, such as ``("cond", "uncond")``. As in the released
            code, ATS and first steps then count passes: step t of T is ``2t/2T`` for the first, ``(2t+1)/2T`` for the
            second.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    signal: Signal = RelativeChange("input", follows=True)
    if swd or cfc:
        signal = SalientChange(beta_s if swd else 0.0, saliency)
    extrapolate = Extrapolate(
        gamma="projection" if ofa else "ratio",
        clamp=gamma if ofa else (1.0, 2.0),
        warp=Warp(tuple(warp)) if warp else None,
    )
    return Policy(
        name="worldcache_pcd",
        spans=ProbeAndTail(probe),
        trigger=ScheduledAccumulate(
            guard=steps_after_probe(probe=probe, retain=retain, last=last, protection=protection, branches=branches),
            signal=signal,
            metric="change",
            threshold=threshold,
            alpha=alpha if cfc else None,
            beta_d=beta_d if ats else None,
            branches=named(branches),
        ),
        predictor=extrapolate,
        lifetime="chunk",
        reads_pass_input=True,
        guided=named(branches),
    )


_RELEASED = {"threshold": 0.06, "gamma": (0.2, 1.8), "branches": ("cond", "uncond")}
_COSMOS = {**_RELEASED, "probe": 2, "saliency": "deviation", "beta_d": "code"}

#: The settings of the released README for Cosmos, what its code has where none are given, and the README's for Wan.
PRESETS = {
    "released": {**_COSMOS, "beta_s": 1.0, "alpha": 2.0},
    "released-code": {**_COSMOS, "beta_s": 5.0, "alpha": 5.0},
    "released-wan": {
        **_RELEASED,
        "probe": 3,
        "saliency": "token deviation",
        "beta_s": 0.12,
        "alpha": 0.2,
        "beta_d": 4.0,
    },
}


@dataclass(frozen=True)
class SalientChange(Signal):
    """Drift of the probe, more where the picture has structure, and motion of the input (arXiv 2603.22286, SWD, CFC).

    Compared with the latest pass, ``change`` is ``mean[mean_c|z - z_prev| · (1 + beta_s·S)] / mean|z_prev|``, and
    ``motion`` is ``mean|x - x_prev| / mean|x_prev|``. S is brought to 0..1. Frames are those of the view groups;
    without these, all tokens are one frame.

    Attributes:
        saliency: ``"variance"``: S is the variance of z over channels, averaged over batch and frames.
            ``"deviation"``: the standard deviation (unbiased) of z_prev over frames and channels together, of each
            sample by itself. ``"token deviation"``: over the channels of each token of all frames.
    """

    beta_s: float
    saliency: Saliency = "variance"
    follows: bool = True
    reads_layout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least_zero("beta_s", self.beta_s)
        one_of("saliency", self.saliency, get_args(Saliency))

    def prepare(self, shape: torch.Size, device: torch.device, view_groups: tuple[ViewGroup, ...]) -> Signal:
        """Precompute for hidden states ``[B, F·N, C]``, or with more axes, the frames first.

        Raises:
            ValueError: the tokens are not whole frames of the view groups.
        """
        length = torch.Size(shape[1:-1] if len(shape) > 2 else shape[:1]).numel()
        if self.saliency == "token deviation":
            return PreparedSalientChange(self, 1, length)
        if len(shape) > 3:
            return PreparedSalientChange(self, shape[1], length // shape[1])
        per_frame = sum(group.tokens for group in view_groups) or length
        if length % per_frame:
            raise ValueError(
                f"a hidden state of {length} tokens is not whole frames of the {per_frame} tokens that view_groups "
                f"name; correct them, or pass view_groups=() to take all tokens as one frame"
            )
        return PreparedSalientChange(self, length // per_frame, per_frame)


class PreparedSalientChange(Signal):
    def __init__(self, of: SalientChange, frames: int, per_frame: int) -> None:
        self._beta_s, self._by_variance, self._grid = of.beta_s, of.saliency == "variance", (frames, per_frame)

    def read(self, call: Call) -> Tensor:
        """z and x, stacked."""
        return torch.stack([call.x.detach().float(), call.pass_input.detach().float()])

    def compare(self, now: Tensor, then: Tensor) -> Tensor:
        z_BFNC, z_prev_BFNC = (value[0].reshape(-1, *self._grid, value.shape[-1]) for value in (now, then))
        if self._by_variance:
            drift_BN = (z_BFNC - z_prev_BFNC).abs().mean(3).mean((0, 1))[None]
            saliency_BN = z_BFNC.var(3, correction=0).mean((0, 1))[None]
        else:
            drift_BN = (z_BFNC - z_prev_BFNC).abs().mean((1, 3))
            saliency_BN = z_prev_BFNC.std((1, 3))
        low, high = saliency_BN.amin(1, keepdim=True), saliency_BN.amax(1, keepdim=True)
        spread = (high - low).clamp_min(torch.finfo(torch.float32).tiny) if self._by_variance else high - low + 1e-6
        saliency_BN = (saliency_BN - low) / spread
        drift = (drift_BN * (1 + self._beta_s * saliency_BN)).mean()
        return torch.stack([drift, then[0].abs().mean(), (now[1] - then[1]).abs().mean(), then[1].abs().mean()])

    def metrics(self, numbers: Sequence[float]) -> dict[str, float]:
        """``change``: 0 where nothing moved, infinite where something did that was zero; and ``motion``."""
        drift, size, motion, input_size = numbers
        return {"change": relative(drift, size), "motion": motion / (input_size + EPSILON)}


@dataclass(frozen=True, kw_only=True)
class ScheduledAccumulate(Accumulate):
    """Sums a metric against a threshold that falls with motion and rises towards the end (arXiv 2603.22286, CFC, ATS).

    The threshold is ``threshold / (1 + alpha·motion) · (1 + beta_d·t/T)``, t of T steps counted from the noisiest.

    Attributes:
        alpha: None leaves the motion out.
        beta_d: None leaves the step out; ``"code"`` is ``u²/6 + u/2 + 10/3`` with u = T/35, as in the released code.
        branches: where there are any, t and T count the passes of these guidance branches.
    """

    alpha: float | None
    beta_d: float | Literal["code"] | None
    branches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Accumulate.__post_init__(self)
        if self.alpha is not None:
            at_least_zero("alpha", self.alpha)
        if self.beta_d is not None and self.beta_d != "code":
            if isinstance(self.beta_d, str):
                raise ValueError(f"beta_d={self.beta_d!r} is neither a number nor 'code'")
            at_least_zero("beta_d", self.beta_d)

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        threshold = self.threshold
        if self.alpha is not None:
            threshold /= 1 + self.alpha * metrics["motion"]
        if self.beta_d is not None:
            number, passes = counted(call.step, self.branches)
            u = passes / STEPS
            beta = u * u / 6 + u / 2 + 10 / 3 if isinstance(self.beta_d, str) else self.beta_d
            threshold *= 1 + beta * number / passes
        return Accumulate(metric=self.metric, threshold=threshold, polynomial=self.polynomial).judge(call, metrics)

"""Parts of DiCache and of WorldCache-PCD: what a probe of a few blocks tells of the tail behind them.

In the notation of both: x entered the pass, z left the probe, y the tail; P = z - x and R = y - x, 1 the newer, 2 the
older of the last two computed steps.

Shape suffixes: B batch, F latent frames, N tokens of a frame, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from holdover.engine.contract import Call, Verdict
from holdover.engine.slots import ViewGroup
from holdover.methods.parts.flow import Warp
from holdover.methods.parts.gates import Accumulate, at_least_zero
from holdover.methods.parts.guards import Guard, Protection, for_steps
from holdover.methods.parts.history import before
from holdover.methods.parts.predictors import Predictor
from holdover.methods.parts.signals import relative

EPSILON = 1e-8

#: The steps for which the released code of WorldCache-PCD was tuned.
STEPS = 35


@dataclass(frozen=True)
class SalientChange:
    """Drift of the probe, more where the picture has structure, and motion of the input (arXiv 2603.22286, SWD, CFC).

    Compared with the latest pass, ``change`` is ``mean[mean_c|z - z_prev| · (1 + beta_s·S)] / mean|z_prev|`` with S the
    variance of z over channels, averaged over batch and time, brought to 0..1. ``motion`` is
    ``mean|x - x_prev| / mean|x_prev|``. Frames are those of the view groups; without these, all tokens are one frame.
    """

    beta_s: float
    follows: ClassVar[bool] = True
    reads_layout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least_zero("beta_s", self.beta_s)

    def prepare(
        self, shape: torch.Size, device: torch.device, view_groups: tuple[ViewGroup, ...]
    ) -> SalientChangeReading:
        """Precompute for hidden states ``[B, F·N, C]``, or with more axes, the frames first.

        Raises:
            ValueError: the tokens are not whole frames of the view groups.
        """
        length = torch.Size(shape[1:-1] if len(shape) > 2 else shape[:1]).numel()
        if len(shape) > 3:
            return SalientChangeReading(self.beta_s, shape[1], length // shape[1])
        per_frame = sum(group.tokens for group in view_groups) or length
        if length % per_frame:
            raise ValueError(
                f"a hidden state of {length} tokens is not whole frames of the {per_frame} tokens that view_groups "
                f"name; correct them, or pass view_groups=() to take all tokens as one frame"
            )
        return SalientChangeReading(self.beta_s, length // per_frame, per_frame)


class SalientChangeReading:
    def __init__(self, beta_s: float, frames: int, per_frame: int) -> None:
        self._beta_s, self._grid = beta_s, (frames, per_frame)

    def read(self, call: Call) -> Tensor:
        """z and x, stacked."""
        return torch.stack([call.x.detach().float(), call.entry.detach().float()])

    def compare(self, now: Tensor, then: Tensor) -> Tensor:
        z_BFNC, z_prev_BFNC = (value[0].reshape(-1, *self._grid, value.shape[-1]) for value in (now, then))
        drift_N = (z_BFNC - z_prev_BFNC).abs().mean(3).mean((0, 1))
        saliency_N = z_BFNC.var(3, correction=0).mean((0, 1))
        low, high = saliency_N.min(), saliency_N.max()
        saliency_N = (saliency_N - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        drift = (drift_N * (1 + self._beta_s * saliency_N)).mean()
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
    """

    alpha: float | None
    beta_d: float | Literal["code"] | None

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
            steps = call.step.num_steps
            u = steps / STEPS
            beta = u * u / 6 + u / 2 + 10 / 3 if isinstance(self.beta_d, str) else self.beta_d
            threshold *= 1 + beta * call.step.index / steps
        return Accumulate(metric=self.metric, threshold=threshold, polynomial=self.polynomial).judge(call, metrics)


@dataclass(frozen=True, kw_only=True)
class Extrapolate(Predictor):
    """The tail along the line through its last two residuals, as far as the probe has gone: ``x + R2 + γ·(R1 - R2)``.

    With one residual, ``x + R1``. Statistics in float32.

    Attributes:
        gamma: ``"ratio"`` is DiCache's ``mean|P - P2| / mean|P1 - P2|``; ``"projection"`` WorldCache-PCD's
            ``<P - P2, P1 - P2> / ‖P1 - P2‖²`` (OFA).
        clamp: of γ.
        warp: moves R1 and R2 along with the picture; None leaves them in place.
    """

    gamma: Literal["ratio", "projection"]
    clamp: tuple[float, float]
    warp: Warp | None = None

    def __post_init__(self) -> None:
        if len(self.clamp) != 2 or not self.clamp[0] <= self.clamp[1]:
            raise ValueError(f"gamma={self.clamp} is not a range; give the least and the largest γ, such as (0.0, 2.0)")

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            kept = {"R1": y - call.entry, "P1": _probe(call)}
            if self.warp is not None:
                kept["picture"] = self.warp.picture(call.entry)
        held = before(call)
        if held is not None:
            kept |= {"R2": held.tensors["R1"], "P2": held.tensors["P1"]}
        return kept

    def predict(self, call: Call) -> Tensor:
        assert call.held is not None
        held = call.held.tensors
        move = self.warp.along(held["picture"], call.entry) if self.warp is not None else lambda residual: residual
        if "R2" not in held:
            return call.entry + move(held["R1"])
        older = move(held["R2"])
        return call.entry + (older + self.factor(call) * (move(held["R1"]) - older))

    def factor(self, call: Call) -> Tensor:
        """γ, on the device; 0 before the clamp where the probe stood still between the two computed steps."""
        assert call.held is not None
        held = call.held.tensors
        now, then = _probe(call) - held["P2"], held["P1"] - held["P2"]
        if self.gamma == "ratio":
            gamma = now.abs().mean() / then.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
        else:
            gamma = (now * then).sum() / (then.square().sum() + EPSILON)
        return gamma.clamp(*self.clamp)


def steps_after_probe(*, probe: int, retain: int | float, last: bool, protection: Protection) -> Guard:
    """The guards of a method with a probe of at least one block."""
    if not isinstance(probe, int) or probe < 1:
        raise ValueError(f"probe={probe!r}: give a whole number of blocks, 1 or more")
    return for_steps(retain=retain, last=last, protection=protection)


def _probe(call: Call) -> Tensor:
    """P of this pass."""
    return call.x.detach().float() - call.entry.detach().float()

"""DiCache (arXiv 2508.17356): the first blocks, run at every step, decide for the others and steer their stand-in.

x entered the pass, z left the probe, y the tail; P = z - x and R = y - x, 1 the newer, 2 the older of the last two
computed steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from holdover.method import Call, Policy, Predictor
from holdover.methods.parts.guards import AnyOf, First, Protection, for_steps, named
from holdover.methods.parts.predictors import before
from holdover.methods.parts.signals import RelativeChange
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.triggers import Accumulate

#: Of WorldCache-PCD's γ, as in its released code; the paper leaves it open.
EPSILON = 1e-6


def dicache(
    *,
    threshold: float = 0.08,
    probe: int = 1,
    gamma: tuple[float, float] = (1.0, 2.0),
    retain: First = 0.2,
    last: bool = False,
    branches: Sequence[str] = (),
    protection: Protection = "pass",
) -> Policy:
    """Extrapolate the residual of the blocks after the probe while the probe's output has drifted little.

    From step to step the relative change (L1) of the probe's output is summed; the tail is computed once the sum
    reaches the threshold, which resets it. Else, with the residuals of the last two computed steps, R1 and R2 of the
    whole backbone, P1 and P2 of the probe, the output is ``x + R2 + γ·(R1 - R2)``, where
    ``γ = mean|P - P2| / mean|P1 - P2|``, clipped to 1..2. The presets are the settings of the released code, which
    differ from model to model.

    Args:
        threshold: of the sum.
        probe: first blocks that are always computed.
        gamma: least and largest γ.
        retain: first steps that are computed in full: how many, a share of the steps, or a share and a number more.
        last: compute the last step.
        branches: guidance branches in the order in which they run. The share of first steps is then one of all passes,
            as in the released code for Wan: of 33 steps with two branches it is 13 passes, six steps and a half.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="dicache",
        spans=ProbeAndTail(probe),
        trigger=Accumulate(
            guard=steps_after_probe(probe=probe, retain=retain, last=last, protection=protection, branches=branches),
            signal=RelativeChange("input", follows=True),
            metric="change",
            threshold=threshold,
        ),
        predictor=Extrapolate(gamma="ratio", clamp=gamma),
        lifetime="chunk",
        reads_pass_input=True,
        guided=named(branches),
    )


#: The released code's settings by model.
PRESETS = {
    "wan": {"threshold": 0.08, "gamma": (1.0, 2.0), "retain": 0.2, "branches": ("cond", "uncond")},
    "hunyuan": {"threshold": 0.1, "gamma": (1.0, 1.5), "retain": 0.2},
    "flux": {"threshold": 0.4, "gamma": (1.0, 1.5), "retain": (0.2, 1), "last": True},
}


class Mover(Protocol):
    """Moves tokens along with the picture, such as WorldCache-PCD's `Warp`."""

    def picture(self, x: Tensor) -> Tensor:
        """What to hold of an input, to know its motion later."""
        ...

    def along(self, then_BL: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that moves tokens from where they were then to where they are in ``x``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Extrapolate(Predictor):
    """The tail along the line through its last two residuals, as far as the probe has gone: ``x + R2 + γ·(R1 - R2)``.

    With one residual, ``x + R1``. Statistics in float32.

    Attributes:
        gamma: ``"ratio"`` is DiCache's ``mean|P - P2| / mean|P1 - P2|``; ``"projection"`` WorldCache-PCD's
            ``<P - P2, P1 - P2> / ‖P1 - P2‖²`` (OFA), for each sample of a batch by itself.
        clamp: of γ.
        warp: moves R1 and R2 along with the picture; None leaves them in place.
    """

    gamma: Literal["ratio", "projection"]
    clamp: tuple[float, float]
    warp: Mover | None = None

    def __post_init__(self) -> None:
        if len(self.clamp) != 2 or not self.clamp[0] <= self.clamp[1]:
            raise ValueError(f"gamma={self.clamp} is not a range; give the least and the largest γ, such as (0.0, 2.0)")

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            kept = {"R1": y - call.pass_input, "P1": _probe(call)}
            if self.warp is not None:
                kept["picture"] = self.warp.picture(call.pass_input)
        held = before(call)
        if held is not None:
            kept |= {"R2": held.tensors["R1"], "P2": held.tensors["P1"]}
        return kept

    def predict(self, call: Call) -> Tensor:
        held = call.known.tensors
        move = self.warp.along(held["picture"], call.pass_input) if self.warp is not None else lambda residual: residual
        if "R2" not in held:
            return call.pass_input + move(held["R1"])
        older = move(held["R2"])
        return call.pass_input + (older + self.factor(call) * (move(held["R1"]) - older))

    def factor(self, call: Call) -> Tensor:
        """γ, on the device; 0 before the clamp where the probe stood still between the two computed steps."""
        held = call.known.tensors
        now, then = _probe(call) - held["P2"], held["P1"] - held["P2"]
        if self.gamma == "ratio":
            gamma = now.abs().mean() / then.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
        else:
            gamma = _by_sample(now * then) / (_by_sample(then.square()) + EPSILON)
        return gamma.clamp(*self.clamp)


def steps_after_probe(
    *, probe: int, retain: First, last: bool, protection: Protection, branches: Sequence[str] = ()
) -> AnyOf:
    """The guards of a method with a probe of at least one block."""
    if not isinstance(probe, int) or probe < 1:
        raise ValueError(f"probe={probe!r}: give a whole number of blocks, 1 or more")
    return for_steps(retain=retain, last=last, protection=protection, branches=branches)


def _by_sample(value: Tensor) -> Tensor:
    """The sum over each sample of ``[B, ..., C]``, to be multiplied with all of it."""
    if value.dim() < 3 or len(value) == 1:
        return value.sum()
    return value.sum(tuple(range(1, value.dim())), keepdim=True)


def _probe(call: Call) -> Tensor:
    """P of this pass."""
    return call.x.detach().float() - call.pass_input.detach().float()

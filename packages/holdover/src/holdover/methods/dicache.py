"""DiCache (arXiv 2508.17356): the first blocks, run at every step, decide for the others and steer their stand-in.

x entered the pass, z left the probe, y the tail; P = z - x and R = y - x, 1 the newer, 2 the older of the last two
computed steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from holdover.method import Call, Policy, Predictor
from holdover.methods.parts.guards import AnyOf, Protection, for_steps
from holdover.methods.parts.predictors import before
from holdover.methods.parts.signals import RelativeChange
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.triggers import Accumulate

EPSILON = 1e-8


def dicache(
    *, threshold: float = 0.08, probe: int = 1, retain: int | float = 0.2, protection: Protection = "pass"
) -> Policy:
    """Extrapolate the residual of the blocks after the probe while the probe's output has drifted little.

    From step to step the relative change (L1) of the probe's output is summed; the tail is computed once the sum
    reaches the threshold, which resets it. Else, with the residuals of the last two computed steps, R1 and R2 of the
    whole backbone, P1 and P2 of the probe, the output is ``x + R2 + γ·(R1 - R2)``, where
    ``γ = mean|P - P2| / mean|P1 - P2|``, clipped to 1..2.

    Args:
        threshold: of the sum.
        probe: first blocks that are always computed.
        retain: first steps that are computed in full, by number or as a share.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="dicache",
        spans=ProbeAndTail(probe),
        trigger=Accumulate(
            guard=steps_after_probe(probe=probe, retain=retain, last=False, protection=protection),
            signal=RelativeChange("input", follows=True),
            metric="change",
            threshold=threshold,
        ),
        predictor=Extrapolate(gamma="ratio", clamp=(1.0, 2.0)),
        lifetime="chunk",
        reads_pass_input=True,
    )


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
            ``<P - P2, P1 - P2> / ‖P1 - P2‖²`` (OFA).
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
            gamma = (now * then).sum() / (then.square().sum() + EPSILON)
        return gamma.clamp(*self.clamp)


def steps_after_probe(*, probe: int, retain: int | float, last: bool, protection: Protection) -> AnyOf:
    """The guards of a method with a probe of at least one block."""
    if not isinstance(probe, int) or probe < 1:
        raise ValueError(f"probe={probe!r}: give a whole number of blocks, 1 or more")
    return for_steps(retain=retain, last=last, protection=protection)


def _probe(call: Call) -> Tensor:
    """P of this pass."""
    return call.x.detach().float() - call.pass_input.detach().float()

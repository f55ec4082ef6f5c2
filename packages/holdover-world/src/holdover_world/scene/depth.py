"""Depth for a network: its logarithm, so that errors are relative, as depth metrics count them."""

from __future__ import annotations

import math

from torch import Tensor

NEAR, FAR = 0.5, 655.35  # metres; FAR stands for the sky


def from_metres(metres: Tensor) -> Tensor:
    """Metres along the viewing axis as values in [-1, 1]; distances below `NEAR` count as `NEAR`."""
    return 2 * (metres.clamp(NEAR, FAR) / NEAR).log() / math.log(FAR / NEAR) - 1


def to_metres(values: Tensor) -> Tensor:
    """The inverse of `from_metres`; values are clipped to [-1, 1] first."""
    return NEAR * (FAR / NEAR) ** ((values.clamp(-1, 1) + 1) / 2)

"""Depth as a network sees it: its logarithm, so that errors are relative as depth metrics count them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NEAR, FAR = 0.5, 655.35  # metres; the farther is the sky


def from_metres(metres: NDArray[np.floating]) -> NDArray[np.float32]:
    """Metres along the viewing axis as values in [-1, 1]; nearer than `NEAR` counts as `NEAR`."""
    share = np.log(np.clip(metres, NEAR, FAR) / NEAR) / np.log(FAR / NEAR)
    return np.asarray(2 * share - 1, np.float32)


def to_metres(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """The inverse of `from_metres`, from values clipped to [-1, 1]."""
    share = (np.clip(values, -1, 1).astype(np.float32) + 1) / 2
    return np.asarray(NEAR * (FAR / NEAR) ** share, np.float32)

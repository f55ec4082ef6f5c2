"""What some methods must know of a model and its loop beforehand: TeaCache's polynomial, MagCache's magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from holdover.methods.magcache import magnitude_ratios, measure_magnitudes
from holdover.methods.teacache import changes, measure_changes
from holdover.models.attach import attach
from holdover.tune.loop import Loop


def calibrate(model: nn.Module, loop: Loop, *, degree: int = 4, branch: str = "") -> dict[str, Any]:
    """Run the loop twice, computing everything, and fit what was measured.

    Args:
        model: its first slot declares the tap ``modulated``.
        loop: runs some chunks of the stream "default".
        degree: of TeaCache's polynomial.
        branch: the guidance branch that is measured.

    Returns:
        ``teacache``: the options of ``holdover.policy("teacache", ...)``, from all chunks. ``magcache``: the options of
        ``holdover.policy("magcache", ...)``, from the last chunk. ``points`` and ``rms_error`` say how many points the
        polynomial was fitted to, and how well it fits them.

    Raises:
        ValueError: there are too few different points for the degree, or the last chunk is not finished.
    """
    pairs = measured_changes(model, loop, branch)
    polynomial = fit(pairs, degree)
    moved, output_moved = np.array(pairs).T
    return {
        "teacache": {"polynomial": polynomial},
        "magcache": {"ratios": measured_ratios(model, loop, branch)},
        "points": len(pairs),
        "rms_error": float(np.sqrt(np.mean((np.polyval(polynomial, moved) - output_moved) ** 2))),
    }


def fit(pairs: Sequence[tuple[float, float]], degree: int) -> list[float]:
    """Coefficients, highest power first, of the least-squares polynomial from input to output changes.

    Raises:
        ValueError: there are too few different inputs for the degree.
    """
    moved, output_moved = np.array(pairs).T
    different = len(np.unique(moved))
    if not 0 <= degree < different:
        raise ValueError(
            f"degree={degree} cannot be fitted to {different} different changes; run more steps or chunks, or "
            f"give a lower degree, 0 or more"
        )
    fitted = np.polynomial.Polynomial.fit(moved, output_moved, degree).convert().coef
    coefficients = np.zeros(degree + 1)
    coefficients[: len(fitted)] = fitted
    return [float(coefficient) for coefficient in coefficients[::-1]]


def measured_changes(model: nn.Module, loop: Loop, branch: str = "") -> list[tuple[float, float]]:
    """From step to step, the relative changes (L1) of the modulated input and of the output: TeaCache's points."""
    with attach(model, measure_changes()) as cache:
        loop(cache)
        return changes(cache.snapshot(), branch)


def measured_ratios(model: nn.Module, loop: Loop, branch: str = "") -> list[float]:
    """MagCache's magnitude ratios of the loop's last chunk, one per step."""
    with attach(model, measure_magnitudes()) as cache:
        loop(cache)
        return list(magnitude_ratios(cache.snapshot(), branch))

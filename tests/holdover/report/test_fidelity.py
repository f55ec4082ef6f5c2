"""PSNR and SSIM against closed forms and against the published formula, written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from holdover.report.fidelity import psnr, squared_errors, ssim


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def naive_ssim(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """Wang et al., 2004, equation 13 with a Gaussian window of 11 x 11, per pixel."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()

    def blur(image: NDArray[Any]) -> NDArray[Any]:
        return np.einsum("hwij,ij->hw", sliding_window_view(np.pad(image, 5, mode="symmetric"), (11, 11)), window)

    maps = []
    for c in range(3):
        x, y = first[..., c].astype(float), second[..., c].astype(float)
        mx, my = blur(x), blur(y)
        vx, vy, cxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        maps.append((2 * mx * my + c1) * (2 * cxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(maps, axis=0)


def test_ssim_is_the_published_formula() -> None:
    first = noise(24, 32, 3)
    second = np.clip(first.astype(int) + noise(24, 32, 3, seed=3) // 4, 0, 255).astype(np.uint8)
    naive = naive_ssim(first, second)
    mask = np.zeros((24, 32), bool)
    mask[5:20, 8:30] = True
    # skimage crops a border from its mean, but not from its map.
    assert ssim(first, second) == pytest.approx(naive.mean(), abs=1e-9)
    assert ssim(first, second, mask) == pytest.approx(naive[mask].mean(), abs=1e-9)


@pytest.mark.parametrize("difference", [1, 5, 40])
def test_psnr_of_a_constant_difference(difference: int) -> None:
    video = np.full((3, 24, 32, 3), 100, np.uint8)
    errors = squared_errors(video + np.uint8(difference), video)
    assert errors.tolist() == [difference**2] * 3
    assert psnr(errors) == pytest.approx(20 * math.log10(255 / difference))


def test_psnr_of_no_error() -> None:
    assert psnr(np.zeros(3)) == math.inf

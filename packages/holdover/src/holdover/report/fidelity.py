"""How close one video is to another, picture by picture: PSNR and SSIM.

PSNR is that of the mean squared error over all frames, not a mean of decibels: one frame that is equal bit for bit
would make such a mean infinite.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

#: The name of the view that shows all cameras on one canvas.
STITCHED = "stitched"


def squared_errors(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """The mean squared error of each frame ``[T]`` of two videos ``uint8 [T, ...]``."""
    return np.array([np.square(a.astype(np.float64) - b).mean() for a, b in zip(first, second, strict=True)])


def psnr(squared_errors: NDArray[np.float64]) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pictures, infinite without error."""
    mean = float(np.mean(squared_errors))
    return 10 * math.log10(255**2 / mean) if mean > 0 else math.inf


def ssim(first: NDArray[Any], second: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> float:
    """Structural similarity (Wang et al., 2004: Gaussian window of sigma 1.5) of two pictures ``uint8 [H, W, 3]``.

    With a mask ``[H, W]`` the mean is over the pixels it covers.
    """
    if np.array_equal(first, second):
        return 1.0
    _, full = structural_similarity(  # type: ignore[no-untyped-call]
        first,
        second,
        channel_axis=-1,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return float(full.mean() if mask is None else full[mask].mean())

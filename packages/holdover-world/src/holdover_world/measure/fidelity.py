"""How close a video is to another: PSNR, SSIM and ST-LPIPS, per camera and for the stitched view.

PSNR is computed from the mean squared error over all frames. A mean of decibels would be infinite, because frames of
chunks that are computed in full are equal bit for bit. The stitched view is the rig on one canvas. PSNR and SSIM count
only the pixels that a camera covers; ST-LPIPS sees the whole canvas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdover.report.fidelity import STITCHED, psnr, squared_errors, ssim
from holdover_world.measure.stlpips import StLpips
from holdover_world.scene.cameras import stitch

Video = Mapping[str, NDArray[np.uint8]]  # per camera [T, height, width, 3]
#: Depth is compared up to this many metres. Beyond it are hills and the sky.
FAR = 100.0
_View = tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_] | None]  # a video, its reference, the pixels that count


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Figures of one view. ``psnr_db`` is infinite for equal videos. ``lpips`` is ST-LPIPS, None if not computed."""

    psnr_db: float
    ssim: float
    lpips: float | None

    def to_json(self) -> dict[str, float | None]:
        """Plain JSON values. JSON has no infinity, so the PSNR of equal videos is null."""
        return {
            "psnr_db": self.psnr_db if math.isfinite(self.psnr_db) else None,
            "ssim": self.ssim,
            "lpips": self.lpips,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One video against its reference.

    Attributes:
        errors: the mean squared error of each frame ``[T]`` in units of 1/255, for each camera and the stitched view.
        ssim, lpips: the mean over the sampled frames, for each camera and the stitched view.
    """

    errors: Mapping[str, NDArray[np.float64]]
    ssim: Mapping[str, float]
    lpips: Mapping[str, float]

    def fidelity(self, view: str = STITCHED) -> Fidelity:
        return Fidelity(psnr_db=self.psnr(view), ssim=self.ssim[view], lpips=self.lpips.get(view))

    def psnr(self, view: str = STITCHED, frames: slice = slice(None)) -> float:
        """PSNR in dB over a range of frames."""
        return psnr(self.errors[view][frames])

    def psnr_by(self, frames: int, view: str = STITCHED) -> list[float]:
        """PSNR in dB of consecutive parts of ``frames`` frames. An incomplete last part is left out."""
        errors = self.errors[view]
        return [psnr(errors[i : i + frames]) for i in range(0, len(errors) - frames + 1, frames)]

    def psnr_at_ends(self, frames: int, least: int, view: str = STITCHED) -> tuple[float, float]:
        """PSNR in dB of the first and of the last ``least`` frames, rounded up to whole parts of ``frames`` frames.

        With parts of one window both ends hold the same share of chunks that are computed in full.
        """
        errors = self.errors[view][: len(self.errors[view]) // frames * frames]
        count = math.ceil(least / frames) * frames
        return psnr(errors[:count]), psnr(errors[-count:])


def compare(video: Video, reference: Video, *, every: int = 1, distance: StLpips | None = None) -> Comparison:
    """Compare two videos of the same cameras, sizes and length.

    Args:
        video, reference: per camera ``uint8 [T, height, width, 3]``.
        every: SSIM and ST-LPIPS are computed on every n-th frame, PSNR on all.
        distance: ST-LPIPS, or None to leave it out.

    Raises:
        ValueError: the videos do not match.
    """
    if {n: v.shape for n, v in video.items()} != {n: v.shape for n, v in reference.items()}:
        raise ValueError("the videos differ in cameras, sizes or length; compare runs of one scenario")
    if every < 1:
        raise ValueError(f"every={every} is not a number of frames; give 1 or more")
    errors = {name: squared_errors(frames, reference[name]) for name, frames in video.items()}
    pixels = {name: frames.shape[1] * frames.shape[2] for name, frames in video.items()}
    weighted = sum(errors[name] * size for name, size in pixels.items())
    errors[STITCHED] = np.asarray(weighted / sum(pixels.values()))

    views: dict[str, _View] = {
        name: (frames[::every], reference[name][::every], None) for name, frames in video.items()
    }
    first, second = {n: a for n, (a, _, _) in views.items()}, {n: b for n, (_, b, _) in views.items()}
    covered = stitch({name: np.ones(frames.shape[1:], dtype=bool) for name, frames in video.items()})[..., 0]
    views[STITCHED] = stitch(first), stitch(second), covered
    return Comparison(
        errors=errors,
        ssim={name: _mean_ssim(a, b, mask) for name, (a, b, mask) in views.items()},
        lpips={name: fmean(distance(a, b)) for name, (a, b, _) in views.items()} if distance else {},
    )


def depth_errors(made: NDArray[np.floating], true: NDArray[np.floating]) -> dict[str, float | None]:
    """Errors of depth ``[...]`` in metres, over the pixels whose true depth is less than `FAR`.

    ``abs_rel`` is the mean of ``|made - true| / true``. ``within_1.25`` is the share of pixels whose larger depth is
    less than 1.25 times the smaller. Both are None if no pixel is near. Source: Eigen et al., arXiv 1406.2283, 4.
    """
    near = (true > 0) & (true < FAR)
    if not near.any():
        return {"abs_rel": None, "within_1.25": None}
    ratio = made[near].astype(np.float64) / true[near]
    within = np.maximum(ratio, 1 / ratio) < 1.25
    return {"abs_rel": float(np.abs(ratio - 1).mean()), "within_1.25": float(within.mean())}


def _mean_ssim(first: NDArray[Any], second: NDArray[Any], mask: NDArray[np.bool_] | None) -> float:
    return fmean(ssim(a, b, mask) for a, b in zip(first, second, strict=True))

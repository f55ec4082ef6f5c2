"""The figures of the X-Cache paper (arXiv 2604.20289)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    """One split of the paper: 7 cameras, 264 frames at 12 frames/s, 4 steps, 30 blocks. The reference is full compute.

    ``lpips`` is LPIPS, not ST-LPIPS. Times are of the DiT alone, in seconds per chunk.
    """

    split: str
    clips: int
    psnr_db: float
    ssim: float
    lpips: float
    skip: float
    full_seconds: float
    cached_seconds: float
    speedup: float


X_CACHE = {
    "urban": Published(
        split="urban",
        clips=7,
        psnr_db=51.37,
        ssim=0.9990,
        lpips=3.3e-4,
        skip=0.714,
        full_seconds=3.682,
        cached_seconds=1.392,
        speedup=2.65,
    ),
    "highway": Published(
        split="highway",
        clips=3,
        psnr_db=54.67,
        ssim=0.9991,
        lpips=1.9e-4,
        skip=0.716,
        full_seconds=3.633,
        cached_seconds=1.365,
        speedup=2.66,
    ),
    "uturn": Published(
        split="U-turn",
        clips=3,
        psnr_db=52.04,
        ssim=0.9990,
        lpips=3.1e-4,
        skip=0.713,
        full_seconds=3.688,
        cached_seconds=1.364,
        speedup=2.70,
    ),
}

"""Metrics against closed forms, against formulas written out, and against values of the original package."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from holdover.report.fidelity import STITCHED, ssim
from holdover_world.measure import stlpips
from holdover_world.measure.fidelity import compare
from holdover_world.measure.stlpips import StLpips


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def rig(seed: int = 0, frames: int = 4) -> dict[str, NDArray[np.uint8]]:
    return {"front_wide": noise(frames, 24, 32, 3, seed=seed), "rear": noise(frames, 16, 24, 3, seed=seed + 1)}


@pytest.mark.parametrize("difference", [1, 5, 40])
def test_psnr_of_a_constant_difference(difference: int) -> None:
    video = {"front_wide": np.full((3, 24, 32, 3), 100, np.uint8)}
    other = {"front_wide": np.full((3, 24, 32, 3), 100 + difference, np.uint8)}
    assert compare(other, video).psnr() == pytest.approx(20 * math.log10(255 / difference))


def test_equal_videos() -> None:
    comparison = compare(rig(), rig(), distance=StLpips())
    assert comparison.psnr() == math.inf
    assert comparison.fidelity().to_json() == {"psnr_db": None, "ssim": 1.0, "lpips": 0.0}


def test_stitched_psnr_weights_cameras_by_pixels_without_the_canvas() -> None:
    video = {name: np.zeros_like(frames) for name, frames in rig().items()}
    other = {"front_wide": video["front_wide"] + np.uint8(3), "rear": video["rear"] + np.uint8(7)}
    wide, rear = 24 * 32, 16 * 24
    mean = (wide * 3**2 + rear * 7**2) / (wide + rear)
    assert compare(other, video).psnr() == pytest.approx(10 * math.log10(255**2 / mean))


def test_psnr_pools_errors_over_frames_and_ranges() -> None:
    video = {"rear": np.zeros((4, 16, 24, 3), np.uint8)}
    other = {"rear": video["rear"].copy()}
    other["rear"][2] = 8  # two equal frames, then one that is off by 8, then an equal one
    comparison = compare(other, video)
    assert comparison.psnr() == pytest.approx(10 * math.log10(255**2 / (64 / 4)))
    assert comparison.psnr(frames=slice(2)) == math.inf
    assert comparison.psnr_by(2) == [math.inf, pytest.approx(10 * math.log10(255**2 / (64 / 2)))]


def test_ends_hold_whole_windows() -> None:
    """Three of four frames of each window differ. Both ends show this ratio; five frames at either end would not."""
    video = {"rear": np.zeros((19, 16, 24, 3), np.uint8)}
    other = {"rear": video["rear"].copy()}
    other["rear"][np.arange(19) % 4 > 0] = 8
    comparison = compare(other, video)
    first, last = comparison.psnr_at_ends(4, 5)
    assert first == last == pytest.approx(10 * math.log10(255**2 / 48))
    assert comparison.psnr(frames=slice(5)) > comparison.psnr(frames=slice(-5, None))
    other["rear"][:9] = 0
    assert compare(other, video).psnr_at_ends(4, 5) == (math.inf, last)
    assert compare(other, video).psnr_at_ends(4, 99)[0] == compare(other, video).psnr_at_ends(4, 99)[1] < math.inf


def test_every_changes_the_sampled_frames_but_not_psnr() -> None:
    video, other = rig(frames=6), rig(seed=5, frames=6)
    whole, sampled = compare(other, video), compare(other, video, every=4)
    assert sampled.psnr() == whole.psnr()
    expected = np.mean([ssim(other["rear"][t], video["rear"][t]) for t in (0, 4)])
    assert sampled.ssim["rear"] == pytest.approx(expected)


def test_stitched_ssim_counts_covered_pixels_only() -> None:
    video = {name: np.full_like(frames, 128) for name, frames in rig(frames=1).items()}
    other = rig(frames=1)
    assert compare(other, video).ssim[STITCHED] < 0.1  # with the black canvas it would be at least a third


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(48, 64, 0.19554798305034637), (64, 128, 0.2706626057624817)]
)
def test_stlpips_gives_the_numbers_of_its_package(height: int, width: int, expected: float) -> None:
    """Computed with `stlpips_pytorch.stlpips.LPIPS(net="alex", variant="shift_tolerant")` on these pictures."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    first, second = (x * 7 + y * 3 + c * 50) % 256, (x * 7 + y * 5 + c * 40) % 256
    distance = StLpips()
    assert distance(first[None].astype(np.uint8), second[None].astype(np.uint8)) == [pytest.approx(expected, rel=1e-5)]
    assert distance(second[None].astype(np.uint8), first[None].astype(np.uint8)) == [pytest.approx(expected, rel=1e-5)]


def test_missing_weights_name_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stlpips, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install stlpips_pytorch"):
        StLpips()


def test_videos_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in cameras"):
        compare(rig(frames=3), rig(frames=4))
    with pytest.raises(ValueError, match="every=0"):
        compare(rig(), rig(), every=0)
    with pytest.raises(ValueError, match="one shape"):
        StLpips()(noise(1, 24, 32, 3), noise(1, 24, 24, 3))

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from holdover.world.sampler import denoise, noise_levels


def test_shift_five_over_four_steps() -> None:
    assert noise_levels(4, 5.0) == pytest.approx((1.0, 15 / 16, 5 / 6, 5 / 8))
    assert noise_levels(4, 1.0) == pytest.approx((1.0, 0.75, 0.5, 0.25))


@pytest.mark.parametrize(("steps", "shift"), [(0, 5.0), (4, 0.0)])
def test_impossible_schedules_are_refused(steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match=f"steps={steps}"):
        noise_levels(steps, shift)


def test_known_frames_are_renoised_with_the_noise_of_their_step() -> None:
    noise, known = torch.randn(3, 1, 4, 2, 5), torch.randn(1, 2, 2, 5)
    sigmas = noise_levels(3, 5.0)
    seen: list[Tensor] = []
    guesses = [torch.full((1, 4, 2, 5), float(i)) for i in range(3)]

    def predict(index: int, noisy: Tensor) -> Tensor:
        seen.append(noisy)
        return guesses[index].clone()

    window = denoise(predict, noise, sigmas, known)
    assert torch.equal(seen[0], noise[0])  # nothing but noise at sigma 1
    for i in (1, 2):
        torch.testing.assert_close(seen[i][:, :2], (1 - sigmas[i]) * known + sigmas[i] * noise[i, :, :2])
        torch.testing.assert_close(seen[i][:, 2:], (1 - sigmas[i]) * (i - 1.0) + sigmas[i] * noise[i, :, 2:])
    assert torch.equal(window[:, :2], known)
    assert torch.equal(window[:, 2:], guesses[2][:, 2:])

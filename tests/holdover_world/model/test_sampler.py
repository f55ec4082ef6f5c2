from __future__ import annotations

import pytest
import torch
from torch import Tensor

from holdover_world.model.sampler import denoise, noise_levels


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


@pytest.mark.parametrize("known", [0, 2])
def test_eulers_steps_follow_the_flow_of_a_gaussian(known: int) -> None:
    """The flow of normally distributed data is known: noise e ends at mean + deviation * e."""
    mean, deviation = 0.7, 0.4
    noise = torch.randn(1, 1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    sigmas, seen = noise_levels(400, 5.0), []

    def posterior_mean(step: int, noisy: Tensor) -> Tensor:
        sigma = sigmas[step]
        seen.append(noisy)
        gain = (1 - sigma) * deviation**2 / ((1 - sigma) ** 2 * deviation**2 + sigma**2)
        return mean + gain * (noisy - (1 - sigma) * mean)

    done = torch.full((known, 3, 5), 9.0)
    window = denoise(posterior_mean, noise, sigmas, [done], sampler="euler")
    torch.testing.assert_close(window[:, known:], (mean + deviation * noise[0])[:, known:], atol=0.02, rtol=0.0)
    for step in (0, 200, 399):  # known frames get the first noise at every level
        expected = (1 - sigmas[step]) * done + sigmas[step] * noise[0, 0, :known]
        torch.testing.assert_close(seen[step][0, :known], expected)

from __future__ import annotations

import torch

from holdover.world.adversary import Discriminator, adversarial_gradient, discriminator_loss
from holdover.world.latents import to_video, unpatchify

from .small import latents, small_config, small_model


def test_the_discriminator_learns_to_tell_blurred_video_from_sharp() -> None:
    torch.manual_seed(0)
    model = small_model()
    judge = Discriminator(model.config, width=8)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=0.003, betas=(0.0, 0.9))
    for seed in range(40):
        sharp = latents(model, 2, seed=seed)
        loss = discriminator_loss(judge(sharp), judge(sharp * 0.5))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    sharp = latents(model, 2, seed=99)
    assert (judge(sharp) > judge(sharp * 0.5)).float().mean() > 0.9


def test_its_gradient_raises_the_score_and_has_the_length_asked_for() -> None:
    torch.manual_seed(0)
    model = small_model()
    judge = Discriminator(model.config, width=8).eval()
    recorded, made = latents(model, 2), latents(model, 2, seed=5)
    pull = torch.full_like(made, 0.01)
    push = adversarial_gradient(judge, made, recorded, pull, 2.0)
    torch.testing.assert_close(push.norm(), 2 * pull.norm())
    assert judge(made - push).mean() > judge(made).mean()
    assert all(p.grad is None for p in judge.parameters())  # the judge itself is not trained by it


def test_it_scores_every_span_of_every_camera() -> None:
    """By hand: three half-overlapping spans of two latent frames; strides leave an eighth of height and width."""
    config = small_config()
    judge = Discriminator(config)
    patches = sum((camera.height // 8) * (camera.width // 8) for camera in config.cameras)
    assert judge(latents(small_model(), 2)).shape == (3 * patches,)


def test_video_is_what_the_rounded_video_rounds() -> None:
    config, x = small_config(), latents(small_model(), 2).clamp(-1, 1)
    for name, video in unpatchify(x, config).items():
        torch.testing.assert_close(video.float(), ((to_video(x, config)[name] + 1) * 127.5).round())

"""What sharpens a few-step model: its own rollouts, judged by a discriminator as well as by the recording.

A regression answers an open future with its mean, a blur, and a rollout fed with blur blurs further. So the finished
model is trained on, on rollouts of its own (Self-Forcing, Huang et al., arXiv 2506.08009: the gradient enters one
random denoising pass per chunk, which is also the last), where a patch discriminator (Isola et al., arXiv 1611.07004;
spectral norm, Miyato et al., arXiv 1802.05957; relativistic paired loss, Jolicoeur-Martineau, arXiv 1807.00734) tells
generated video from recorded one, as in adversarial post-training (Lin et al., arXiv 2506.09350).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from holdover.world.config import WorldConfig
from holdover.world.latents import to_video


class Discriminator(nn.Module):
    """Scores short spans of video, camera by camera and patch by patch; higher is more like a recording.

    It sees as many consecutive video frames as a latent frame holds, and overlapping spans, hence also the borders of
    latent frames.
    """

    def __init__(self, config: WorldConfig, *, width: int = 32) -> None:
        super().__init__()
        self.config, frames = config, config.frames_per_latent
        self.camera = nn.Embedding(len(config.cameras), width)
        self.first = spectral_norm(nn.Conv2d(3 * frames, width, 4, 2, 1))
        self.rest = nn.ModuleList(
            spectral_norm(nn.Conv2d(width * a, width * b, kernel, stride, 1))
            for a, b, kernel, stride in ((1, 2, 4, 2), (2, 4, 4, 2), (4, 4, 3, 1))
        )
        self.score = spectral_norm(nn.Conv2d(4 * width, 1, 1))

    def forward(self, latents_BFNP: Tensor) -> Tensor:
        """The scores of all patches of all spans of all cameras, in one row."""
        scores, frames = [], self.config.frames_per_latent
        for index, video in enumerate(to_video(latents_BFNP, self.config).values()):
            spans = video.unfold(1, frames, max(1, frames // 2))  # [B, S, H, W, 3, frames]
            x = self.first(spans.flatten(-2).flatten(0, 1).permute(0, 3, 1, 2))
            x = F.leaky_relu(x + self.camera.weight[index][:, None, None], 0.2)
            for layer in self.rest:
                x = F.leaky_relu(layer(x), 0.2)
            scores.append(self.score(x).flatten())
        return torch.cat(scores)


def discriminator_loss(recorded: Tensor, generated: Tensor) -> Tensor:
    """Relativistic loss of paired scores: each patch of a recording above the same patch of the generated video."""
    return F.softplus(generated - recorded).mean()


def adversarial_gradient(
    judge: Discriminator, prediction: Tensor, recorded: Tensor, pull: Tensor, weight: float
) -> Tensor:
    """Where ``prediction`` scores higher against ``recorded``; ``weight`` times as long as a regression's ``pull``."""
    with torch.no_grad():
        rival = judge(recorded)
    leaf = prediction.detach().requires_grad_(True)
    push: Tensor = torch.autograd.grad(discriminator_loss(judge(leaf), rival), leaf)[0]
    length: Tensor = weight * pull.norm() / push.norm().clamp_min(1e-12)
    return length * push

"""Video to latents and back: a convolutional autoencoder, one fourth of the frames, one eighth of the rows and columns.

Four frames become the channels of one picture, so all convolutions are two-dimensional. Decoding also sees the latent
frame before, and nothing else reaches across latent frames, so a video can be decoded as a stream. A fixed linear path
maps blocks of 8 by 8 pixels to their principal components and back, which is the best linear autoencoder. The
convolutions learn a correction to it, which takes a fraction of the time of learning everything. Where resolution
changes, pixels move to channels and back, beside a path that only averages or repeats them (Chen et al., DC-AE, arXiv
2410.10733, section 3.2). Latents are Gaussian with a small KL term (Rombach et al., arXiv 2112.10752).

Shape suffixes: B batch, F latent frames, T video frames, C colours, Z latent channels, H rows and W columns of pixels,
h and w of latents, M blocks of pixels, Q values of one block.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from holdover_world.config import FRAMES, SCALE

_PATCH = 4  # pixels that become channels before the first convolution, each way

#: Weights whose names begin so belong to the decoder; all others belong to the encoder.
DECODING = ("latent.", "decoder.", "leave.")


class Conv(nn.Linear):
    """A 3 by 3 convolution whose kernel is stored as a matrix, so that the optimiser for matrices (Muon) trains it."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(9 * channels, out)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.view(len(self.weight), -1, 3, 3), self.bias, padding=1)


class Residual(nn.Module):
    """Two convolutions added to their input. Normalisation would cost more than it helps at this size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Conv(channels, channels)
        self.second = Conv(channels, channels)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class Down(nn.Module):
    """Half the resolution."""

    def __init__(self, channels: int, out: int, factor: int = 2) -> None:
        super().__init__()
        self.factor, self.out = factor, out
        self.conv = Conv(channels * factor**2, out)

    def forward(self, x: Tensor) -> Tensor:
        moved = F.pixel_unshuffle(x, self.factor)
        return self.conv(moved) + moved.unflatten(1, (self.out, -1)).mean(2)


class Up(nn.Module):
    """Twice the resolution."""

    def __init__(self, channels: int, out: int, factor: int = 2) -> None:
        super().__init__()
        self.factor, self.repeats = factor, out * factor**2 // channels
        self.conv = Conv(channels, out * factor**2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x) + x.repeat_interleave(self.repeats, 1), self.factor)


class Autoencoder(ModelMixin, ConfigMixin):
    """A causal video autoencoder.

    Args:
        colours: channels of a video frame: 3, or 1 for depth.
        latent_channels: Z.
        widths: channels at a quarter and at an eighth of the resolution.
        encoder_blocks, decoder_blocks: residual blocks at each of the two resolutions.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        *,
        colours: int = 3,
        latent_channels: int = 48,
        widths: tuple[int, int] = (128, 256),
        encoder_blocks: int = 2,
        decoder_blocks: int = 4,
    ) -> None:
        super().__init__()
        fine, coarse = widths
        self.enter = Conv(colours * FRAMES * _PATCH**2, fine)
        self.encoder = nn.Sequential(
            *(Residual(fine) for _ in range(encoder_blocks)),
            Down(fine, coarse),
            *(Residual(coarse) for _ in range(encoder_blocks)),
        )
        self.moments = Conv(coarse, 2 * latent_channels)
        self.latent = Conv(2 * latent_channels, coarse)
        self.decoder = nn.Sequential(
            *(Residual(coarse) for _ in range(decoder_blocks)),
            Up(coarse, fine),
            *(Residual(fine) for _ in range(decoder_blocks)),
        )
        self.leave = Conv(fine, colours * FRAMES * _PATCH**2)
        for layer in (self.moments, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.moments.bias[latent_channels:], -6.0)  # logarithmic variance: little noise
        # The linear path: mean, principal directions (columns) and deviations of blocks of pixels.
        values = colours * FRAMES * SCALE**2
        self.centre_Q: Tensor
        self.basis_QZ: Tensor
        self.deviation_Z: Tensor
        self.register_buffer("centre_Q", torch.zeros(values))
        self.register_buffer("basis_QZ", torch.zeros(values, latent_channels))
        self.register_buffer("deviation_Z", torch.ones(latent_channels))
        # Mean and deviation of each latent channel over the training clips. `encode` normalises by them.
        self.mean_Z: Tensor
        self.std_Z: Tensor
        self.register_buffer("mean_Z", torch.zeros(latent_channels))
        self.register_buffer("std_Z", torch.ones(latent_channels))

    def deepened(self, decoder_blocks: int) -> Autoencoder:
        """The same autoencoder with more blocks in its decoder. The new blocks change nothing until they are trained.

        Raises:
            ValueError: it already has that many blocks.
        """
        own = int(self.config.decoder_blocks)
        if decoder_blocks <= own:
            raise ValueError(f"decoder_blocks={decoder_blocks}: this autoencoder has {own}; give more")
        deeper = Autoencoder.from_config({**self.config, "decoder_blocks": decoder_blocks})
        nn.Module.to(deeper, dtype=self.dtype)  # `ModelMixin.to` warns without need
        with torch.no_grad():
            values = deeper.state_dict()
            for name, value in self.state_dict().items():
                part, _, rest = name.partition(".")
                if part == "decoder":
                    index, _, rest = rest.partition(".")
                    # New blocks are the last of each resolution. All layers after the coarse blocks move back.
                    moved = int(index) + (decoder_blocks - own if int(index) >= own else 0)
                    name = f"decoder.{moved}.{rest}"
                values[name].copy_(value)
        return deeper

    def posterior(self, video_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithmic variance of the latents, not normalised: ``[B, F, Z, h, w]`` each."""
        b, t, c, height, width = video_BTCHW.shape
        if t % FRAMES or height % SCALE or width % SCALE:
            raise ValueError(
                f"{t} frames of {width}x{height}: give a multiple of {FRAMES} frames, and of {SCALE} each way"
            )
        x = video_BTCHW.reshape(b * t // FRAMES, FRAMES * c, height, width)
        linear = (F.pixel_unshuffle(x, SCALE).movedim(1, -1) - self.centre_Q.to(x)) @ self.basis_QZ.to(x)
        x = self.enter(F.pixel_unshuffle(x, _PATCH).contiguous(memory_format=torch.channels_last))
        moments = self.moments(F.silu(self.encoder(x))).unflatten(0, (b, -1))
        mean, log_variance = moments.chunk(2, 2)
        mean = mean + (linear / self.deviation_Z.to(linear)).movedim(-1, 1).unflatten(0, (b, -1))
        return mean, log_variance.clamp(-12, 6)

    @torch.no_grad()
    def take_principal_components(self, blocks_MQ: Tensor) -> None:
        """Set the linear path from samples of blocks ``[M, Q]``, as `blocks` returns them."""
        centre = blocks_MQ.mean(0)
        covariance = (blocks_MQ - centre).T @ (blocks_MQ - centre) / len(blocks_MQ)
        variances, directions = torch.linalg.eigh(covariance)  # the smallest first
        count = len(self.deviation_Z)
        self.centre_Q.copy_(centre)
        self.basis_QZ.copy_(directions[:, -count:].flip(1))
        self.deviation_Z.copy_(variances[-count:].flip(0).clamp(min=1e-6).sqrt())

    @staticmethod
    def blocks(video_BTCHW: Tensor) -> Tensor:
        """All blocks of 8 by 8 pixels and 4 frames of a video, ``[M, Q]``."""
        x = video_BTCHW.unflatten(1, (-1, FRAMES)).flatten(0, 1).flatten(1, 2)
        return F.pixel_unshuffle(x, SCALE).movedim(1, -1).flatten(0, -2)

    def reconstruct(self, z_BFZhw: Tensor, before_BZhw: Tensor | None = None) -> Tensor:
        """Video ``[B, T, C, H, W]`` of latents that are not normalised.

        Args:
            before_BZhw: the latent frame before them; None at the beginning of a video.
        """
        b, f = z_BFZhw.shape[:2]
        if before_BZhw is None:
            before_BZhw = torch.zeros_like(z_BFZhw[:, 0])
        shifted = torch.cat([before_BZhw[:, None], z_BFZhw[:, :-1]], 1)
        x = torch.cat([z_BFZhw, shifted], 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = F.pixel_shuffle(self.leave(F.silu(self.decoder(self.latent(x)))), _PATCH)
        linear = (z_BFZhw.flatten(0, 1).movedim(1, -1) * self.deviation_Z.to(x)) @ self.basis_QZ.to(x).T
        x = x + F.pixel_shuffle((linear + self.centre_Q.to(x)).movedim(-1, 1), SCALE)
        return x.reshape(b, f * FRAMES, -1, *(SCALE * n for n in z_BFZhw.shape[-2:]))

    def encode(self, video_BTCHW: Tensor, *, at_once: int = 1) -> Tensor:
        """Normalised latents ``[B, F, Z, h, w]`` of video in [-1, 1].

        Args:
            at_once: latent frames encoded together. One at a time, a stream gives bit for bit the latents of the whole
                video. Many at a time are faster, and equal within rounding.
        """
        parts = video_BTCHW.to(self.dtype).split(FRAMES * at_once, 1)
        mean = torch.cat([self.posterior(part)[0].float() for part in parts], 1)
        return (mean - self.mean_Z[:, None, None].float()) / self.std_Z[:, None, None].float()

    def decode(self, z_BFZhw: Tensor, before_BZhw: Tensor | None = None) -> Tensor:
        """Video ``[B, T, C, H, W]``, nominally in [-1, 1], of normalised latents, one latent frame at a time.

        Args:
            before_BZhw: the latent frame before them; None at the beginning of a video.
        """
        frames = z_BFZhw if before_BZhw is None else torch.cat([before_BZhw[:, None], z_BFZhw], 1)
        raw = (frames.float() * self.std_Z[:, None, None].float() + self.mean_Z[:, None, None].float()).to(self.dtype)
        first = [] if before_BZhw is not None else [self.reconstruct(raw[:, :1]).float()]
        rest = [self.reconstruct(now[:, None], last).float() for last, now in pairwise(raw.unbind(1))]
        return torch.cat(first + rest, 1)

    def forward(self, video_BTCHW: Tensor, noise_BFZhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For training: the video decoded from a sample of its latents, and their mean and logarithmic variance."""
        mean, log_variance = self.posterior(video_BTCHW.to(self.enter.weight.dtype))
        z = mean + (log_variance / 2).exp() * noise_BFZhw.to(mean.dtype)
        return self.reconstruct(z), mean, log_variance

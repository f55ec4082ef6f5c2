"""What was commanded between two latent frames, read from them: a small network that tells a student if it obeys.

An inverse dynamics model (Baker et al., VPT, arXiv 2206.11795, section 3): easier to learn than dynamics, as it sees
what came after.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from holdover.world.config import WorldConfig
from holdover.world.segments import Segments

#: Largest noise, in standard deviations of latents, that it learns to read through.
NOISE = 0.5
#: Below this difference of normalised actions a squared error takes over from the absolute one.
_BETA = 0.05
_CHANNELS = 64


class InverseDynamics(nn.Module):
    """The normalised action that led from a latent frame to the next: every token's reading, weighted.

    It learns, and judges, from a random share of the tokens through noise. So no few tokens and no faint pattern make a
    frame look obedient.
    """

    def __init__(self, sizes: WorldConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(2 * sizes.patch_values, _CHANNELS)
        self.place_NC = nn.Parameter(torch.zeros(sizes.tokens, _CHANNELS))
        self.mix = nn.Linear(_CHANNELS, _CHANNELS)
        self.reading = nn.Linear(_CHANNELS, sizes.action_dims)
        self.weight = nn.Linear(_CHANNELS, sizes.action_dims)

    def forward(self, before_BNP: Tensor, after_BNP: Tensor, seen_BN: Tensor | None = None) -> Tensor:
        """``[B, A]``, from the tokens that are ``seen`` (default: all)."""
        hidden_BNC = F.gelu(self.embed(torch.cat([before_BNP, after_BNP], -1)) + self.place_NC)
        hidden_BNC = F.gelu(self.mix(hidden_BNC) + self.place_NC)
        weight_BNA = self.weight(hidden_BNC)
        if seen_BN is not None:
            weight_BNA = weight_BNA.masked_fill(~seen_BN[..., None], -torch.inf)
        action_BA: Tensor = (self.reading(hidden_BNC) * weight_BNA.softmax(1)).sum(1)
        return action_BA

    def disagreement(
        self, before_BNP: Tensor, after_BNP: Tensor, true: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> Tensor:
        """How far what is read from two frames is from what is read from two ``true`` ones."""
        with torch.no_grad():
            target = self(*true)
        return self._loss(before_BNP, after_BNP, target, generator)

    def _loss(self, before_BNP: Tensor, after_BNP: Tensor, target_BA: Tensor, generator: torch.Generator) -> Tensor:
        b, n, _ = before_BNP.shape
        device = before_BNP.device
        noise = torch.randn((2, *before_BNP.shape), generator=generator, device=device)
        noise *= NOISE * torch.rand((b, 1, 1), generator=generator, device=device)
        seen_BN = torch.rand((b, n), generator=generator, device=device)
        seen_BN = seen_BN <= seen_BN.amin(1, keepdim=True).clamp(min=torch.rand((), generator=generator, device=device))
        return F.smooth_l1_loss(self(before_BNP + noise[0], after_BNP + noise[1], seen_BN), target_BA, beta=_BETA)


def train_inverse_dynamics(
    segments: Segments, sizes: WorldConfig, *, steps: int, seed: int, device: str = "cpu", batch: int = 64
) -> InverseDynamics:
    """Train one on recorded clips; the same seed gives the same."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InverseDynamics(sizes).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    rng = np.random.default_rng(seed)
    for _ in track(range(steps), description="learning to read motion"):
        drawn = segments.batch(segments.sample(rng, batch, 2), 2, device)
        loss = model._loss(drawn.latents[:, 0], drawn.latents[:, 1], drawn.actions[:, 1], generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval().requires_grad_(False)

"""How world models are trained: the numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train a world model.

    Attributes:
        steps: optimiser steps.
        batch: clips per step.
        own_context_from: share of the steps after which contexts, and half of the noisy inputs, are the model's own.
        plain_share: share of the steps that train the plain cadence (chunks of one latent frame).
        context_noise: largest noise level added to the clean context, so that small errors do not grow.
        l1: weight of an absolute error beside the squared one; it keeps edges sharper.
        adversary: with a value above 0 every step trains on the model's own rollouts, and a discriminator's gradient
            is added, so many times as long as the regression's (see `holdover.world.adversary`);
            ``own_context_from`` has no bearing then.
        rollout, graded: such a rollout has at most so many windows; the last so many of them are learned from.
        judge_rate: learning rate of the discriminator (AdamW).
        muon_rate, adam_rate: peak learning rates of the linear layers' matrices (Muon) and of all else (AdamW).
        muon_weight_decay: of the matrices, against outlier channels.
        warmup, decay: steps of linear warm-up; share of the steps over which the rates fall to zero.
        ema: decay of the averaged weights that are saved.
        levels, shift: the sampler's noise levels, on which alone a few-step model is trained.
        seed: of data order, noise and initial weights.
    """

    steps: int = 1700
    batch: int = 2
    own_context_from: float = 0.82
    plain_share: float = 0.15
    context_noise: float = 0.15
    l1: float = 1.0
    adversary: float = 0.0
    rollout: int = 8
    graded: int = 2
    judge_rate: float = 0.0005
    muon_rate: float = 0.02
    adam_rate: float = 0.001
    muon_weight_decay: float = 0.1
    warmup: int = 50
    decay: float = 0.44
    ema: float = 0.995
    levels: int = 4
    shift: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "warmup", "rollout", "graded"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.adversary >= 0:
            raise ValueError(f"adversary={self.adversary} is negative; give a weight, or 0 for none")
        for name in ("own_context_from", "plain_share", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share of the steps, between 0 and 1")

    def rate(self, step: int) -> float:
        """The learning rate of a step as a share of its peak."""
        remaining = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, remaining)


#: `base`, of the shipped checkpoint, from random weights; and `sharpen`, which goes on from such a checkpoint, with
#: results that are not yet worth shipping (benchmarks/LOG.md).
RECIPES = {
    "base": Recipe(),
    "sharpen": Recipe(
        steps=560,
        own_context_from=0.0,
        adversary=1.0,
        muon_rate=0.006,
        adam_rate=0.0004,
        decay=0.5,
        ema=0.99,
        seed=1,
    ),
}

"""How world models are trained: the numbers."""

from __future__ import annotations

from dataclasses import dataclass

from holdover_world.model.sampler import noise_levels
from holdover_world.training.trainer import Schedule


@dataclass(frozen=True, kw_only=True)
class Recipe(Schedule):
    """How to train a world model.

    Attributes:
        own_context_from: share of the steps after which contexts, and half of the noisy inputs, are the model's own.
        windows: most windows of the model's own making that follow a recorded context.
        plain_share: share of the steps that train the plain cadence (chunks of one latent frame).
        context_noise: largest noise level added to the clean context, so that small errors do not grow.
        unconditional_share: share of the steps without an action, for guidance.
        l1: weight of an absolute error beside the squared one; it keeps edges sharper.
        levels: a few-step model is trained at so many noise levels alone, the sampler's; 0: at all noise levels.
        shift: of the noise levels.
        teacher_steps: Euler steps in which a teacher, where there is one, follows the whole flow, to show its end.
        teacher_guidance: of a teacher on the action, which the student then has in one pass (Meng et al., arXiv
            2210.03142); 1 for none.
        recorded: a student learns what was recorded where its rollouts go, not from its teacher; it may have none.
        without_layout: share of the steps without the recordings' layouts, so that none is needed.
        learned: a student learns from so many windows at the end of its rollout; 0: from all.
        agreement: weight of the error of a student's later chunks of a cycle against its first, in colour.
        depth_weight: of depth beside colour in a student's error against its teacher.
        steady: share of a student's rollouts that go straight on, where the road does, at the speed they began with.
    """

    steps: int = 1600
    batch: int = 3
    decay: float = 0.61
    own_context_from: float = 0.8
    windows: int = 4
    plain_share: float = 0.15
    context_noise: float = 0.15
    unconditional_share: float = 0.05
    l1: float = 0.5
    levels: int = 0
    shift: float = 5.0
    teacher_steps: int = 8
    teacher_guidance: float = 1.0
    recorded: bool = False
    without_layout: float = 0.1
    learned: int = 0
    agreement: float = 0.0
    depth_weight: float = 1.0
    steady: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teacher_steps", "windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.teacher_guidance >= 1:
            raise ValueError(f"teacher_guidance={self.teacher_guidance} must be 1, for none, or more")
        if self.learned < 0:
            raise ValueError(f"learned={self.learned} is a number of windows, 0 for all")
        for name in ("agreement", "depth_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is a weight, 0 for none")
        for name in ("own_context_from", "plain_share", "unconditional_share", "without_layout", "steady"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share of the steps, between 0 and 1")

    @property
    def sampler(self) -> tuple[float, ...]:
        """The noise levels of a sample in training."""
        return noise_levels(self.levels or 4, self.shift)


#: Of a few-step student, which begins with its teacher's weights.
STUDENT = Recipe(
    steps=150,
    batch=1,
    levels=4,
    windows=8,
    muon_rate=0.005,
    adam_rate=0.0003,
    warmup=10,
    decay=0.8,
    ema=0.97,
    seed=1,
    teacher_steps=6,
    teacher_guidance=1.5,
)

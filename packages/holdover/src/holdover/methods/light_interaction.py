"""Light Interaction (arXiv 2605.31158), its step reuse: middle steps are skipped where the world ahead is familiar."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from holdover.method import Call, Guard, Policy, Trigger, Verdict
from holdover.methods.parts.guards import AnyOf, KVProtection, LastStep, Protection, at_least, one_of
from holdover.methods.parts.predictors import Repeat, before
from holdover.methods.parts.spans import ProbeAndTail
from holdover.step import Step

#: How familiar what a chunk will show is, from 0 to 1, as a function of its first step.
Familiar = Callable[[Step], float]


def light_interaction(
    *, familiar: Familiar | None = None, threshold: float = 0.7, protection: Protection = "pass"
) -> Policy:
    """Repeat the output of a chunk's first pass in all passes but the last, where its world was seen before.

    The raw output is repeated, as in the released code; `step_hold` holds the clean prediction instead. Guidance
    branches have outputs of their own; in the released code they share one. The paper's selection of context and its
    sparse attention are not part of this.

    Args:
        familiar: a function of a chunk's first `Step`, which gives 0 to 1, such as `CameraOverlap`.
        threshold: from which on a chunk is familiar.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range, or ``familiar`` is missing.
    """
    if not callable(familiar):
        raise ValueError(
            f"familiar={familiar!r}: give a function of a step that says from 0 to 1 how much of what the chunk will "
            f"show was seen before, such as holdover.methods.light_interaction.CameraOverlap(poses=...)"
        )
    one_of("protection", protection, ("chunk", "pass"))
    guards: list[Guard] = [KVProtection()] if protection == "chunk" else []
    return Policy(
        name="light_interaction",
        spans=ProbeAndTail(0),
        trigger=SeenBefore(guard=AnyOf((*guards, LastStep())), familiar=familiar, threshold=threshold),
        predictor=FirstOutput(),
        lifetime="chunk",
        level="model",
    )


@dataclass(frozen=True, kw_only=True)
class SeenBefore(Trigger):
    """Reuses in the chunks that are familiar enough. The function is asked once per chunk and branch."""

    familiar: Familiar = field(repr=False)
    threshold: float
    #: The function by name, the same in every process.
    score: str = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} is not between 0 and 1")
        named = getattr(self.familiar, "__qualname__", None)
        object.__setattr__(self, "score", f"{self.familiar.__module__}.{named}" if named else repr(self.familiar))

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        score = call.known.numbers["familiar"]
        return Verdict(
            None if score >= self.threshold else "unfamiliar", {"familiar": score, "threshold": self.threshold}
        )

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        if call.entry is not None:
            return call.entry.numbers
        score = float(self.familiar(call.step))
        if not 0 <= score <= 1:
            raise ValueError(f"familiar gave {score} for chunk {call.step.chunk}; it gives 0 to 1")
        return {"familiar": score}


@dataclass(frozen=True)
class FirstOutput(Repeat):
    """Repeats what the first pass of the chunk gave."""

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        held = before(call)
        return dict(held.tensors) if held else super().remember(call, y, spare)


@dataclass(frozen=True, kw_only=True)
class CameraOverlap:
    """How much of what the cameras of a chunk will see, earlier ones saw, 0 to 1: the score of Light Interaction.

    Of points in a ball around camera q, o(q, h) is the share of those in q's frustum that are in h's as well. A point
    is in a frustum if its azimuth and elevation, in q's coordinates, lie within half the field of view of the camera's
    axis; roll is ignored; for h it must lie within the radius, too. An earlier clip that begins at frame h scores the
    mean of ``½[o(q, h) + o(q, h + F/2)]`` over the F frames q of the chunk. The score is that of the best clip.

    Attributes:
        poses: a function of the step: the camera's poses in all latent frames up to the end of its chunk,
            camera to world, ``[T, 4, 4]``. A camera looks along z, with y down.
        frames: F, latent frames of a chunk.
        memory: while fewer frames came before, the score is 0: all of them are context.
        recent: latent frames before the chunk that are context anyway; clips that begin within them do not count.
        radius: of the ball, in the unit of the poses.
        view: horizontal and vertical field of view in degrees.
        points: how many points are drawn, with a fixed seed.
    """

    poses: Callable[[Step], Tensor]
    frames: int = 4
    memory: int = 12
    recent: int = 4
    radius: float = 8.0
    view: tuple[float, float] = (60.0, 35.0)
    points: int = 50_000
    #: The seed of the points.
    SEED: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("memory", 0), ("recent", 0), ("points", 1)):
            at_least(name, getattr(self, name), least)
        if not (self.radius > 0 and all(0 < angle < 180 for angle in self.view)):
            raise ValueError(f"radius={self.radius}, view={self.view}: give a radius above 0, and angles of 0 to 180")

    def __call__(self, step: Step) -> float:
        poses = torch.as_tensor(self.poses(step), dtype=torch.float64, device="cpu")
        if poses.dim() != 3 or poses.shape[1:] != (4, 4) or len(poses) < self.frames:
            raise ValueError(f"poses are {list(poses.shape)}; give [T, 4, 4], at least the {self.frames} of the chunk")
        begins = len(poses) - self.frames
        if begins < self.memory:
            return 0.0
        clips = range(self.frames, begins - self.recent, self.frames)
        return max((self._score(poses, begins, first) for first in clips), default=0.0)

    def _score(self, poses: Tensor, begins: int, first: int) -> float:
        pairs = [(q, h) for q in range(begins, begins + self.frames) for h in (first, first + self.frames // 2)]
        return sum(self.overlap(poses[q], poses[h]) for q, h in pairs) / len(pairs)

    def overlap(self, q: Tensor, h: Tensor) -> float:
        """o(q, h) of two poses ``[4, 4]``; 0 if q sees none of the points."""
        points = _ball(self.points, self.SEED) * self.radius
        relative = torch.linalg.solve(q.double(), h.double())
        apart = points - relative[:3, 3]
        seen = self._within(points, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
        both = seen & self._within(apart, relative[:3, 2]) & (apart.norm(dim=1) < self.radius)
        return float(both.sum() / seen.sum()) if seen.any() else 0.0

    def _within(self, points: Tensor, axis: Tensor) -> Tensor:
        """Which points, seen from a camera, are within its frustum, ``[N]``."""
        (azimuth, elevation), (ahead, up) = _angles(points), _angles(axis)
        turned = (azimuth - ahead + math.pi).remainder(2 * math.pi) - math.pi
        wide, high = (math.radians(angle) / 2 for angle in self.view)
        inside: Tensor = (turned.abs() < wide) & ((elevation - up).abs() < high)
        return inside


@cache
def _ball(points: int, seed: int) -> Tensor:
    """Points spread evenly over a ball of radius 1, ``[N, 3]``."""
    source = torch.Generator().manual_seed(seed)
    directions = torch.randn(points, 3, generator=source, dtype=torch.float64)
    radii: Tensor = torch.rand(points, 1, generator=source, dtype=torch.float64) ** (1 / 3)
    ball: Tensor = directions / directions.norm(dim=1, keepdim=True) * radii
    return ball


def _angles(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Azimuth and elevation of vectors ``[..., 3]``, whose z lies ahead."""
    x, y, z = vectors.unbind(-1)
    return torch.atan2(x, z), torch.atan2(y, torch.hypot(x, z))

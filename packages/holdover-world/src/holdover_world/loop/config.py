"""How a closed loop makes chunks: the cadence and its options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from holdover_world.model.sampler import Sampler, noise_levels

Cadence = Literal["window", "plain"]
Commit = Literal["first", "last_full", "emitted"]


@dataclass(frozen=True, kw_only=True)
class HoldWindow:
    """How near the actions of a frame must be to those that it was drawn with, so that it is shown without a pass.

    By default they are equal. They are always compared with those of the drawing, so differences cannot add up.

    Attributes:
        action: how far each dimension of each action may be off, in normalised units: one number, or one per dimension.
        metres, degrees: instead, how far the place and the heading may be off from which the frame is seen. The model's
            history is `Moving`.
    """

    action: float | tuple[float, ...] = 0.0
    metres: float | None = None
    degrees: float | None = None

    def __post_init__(self) -> None:
        dims = self.action if isinstance(self.action, tuple) else (self.action,)
        named = [("action", value) for value in dims]
        named += [(name, value) for name in ("metres", "degrees") if (value := getattr(self, name)) is not None]
        for name, value in named:
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: give how far it may be off, 0 or more")
        if (self.metres is None) != (self.degrees is None):
            raise ValueError(f"metres={self.metres}, degrees={self.degrees}: give both, or neither")
        if self.metres is not None and any(dims):
            raise ValueError("action and metres are both given; compare actions or poses")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How chunks follow each other.

    Attributes:
        cadence: ``window`` or ``plain``.
        commit: the latents of a cycle that the clean pass writes: the window of its ``first`` chunk, the window of the
            ``last_full`` chunk, which is the last one computed in full, or the pieces as ``emitted``. A chunk starts
            from the pieces emitted before its own. With ``last_full`` and the first chunk protected, it starts from
            these frames in the window to be committed, so that nothing served from cache is committed.
        protected: the chunk of a cycle that is announced as committed, ``first`` or ``last``. Policies with KV
            protection compute it in full.
        fresh_noise: draw new noise for every chunk instead of every cycle.
        hold_window: show the next frame of the window in hand without a pass, where it was drawn with the actions that
            now lead to it. It is then *held*. None: every chunk runs its passes. A chunk that is announced as committed
            is held only where the window in hand was computed in full.
        kv: what writes keys and values into the history: a ``clean`` pass over the committed latents, or the
            ``last_pass`` of denoising, in the plain cadence and without guidance. That saves a pass. Keys and values
            are then of noisy latents, an approximation that later chunks attend to. Caches are told that it writes.
        sampler: how a pass continues the pass before: with new noise (``renoise``), or by Euler's step along the flow
            (``euler``), for many steps.
        guidance: scale of classifier-free guidance on the action (Ho & Salimans, arXiv 2207.12598). Every pass is also
            made without the action, as branch "uncond". 1 means no guidance.
        steps: denoising passes per chunk.
        shift: timestep shift of the noise levels.
    """

    cadence: Cadence = "window"
    commit: Commit = "first"
    protected: Literal["first", "last"] = "first"
    fresh_noise: bool = False
    hold_window: HoldWindow | None = None
    kv: Literal["clean", "last_pass"] = "clean"
    sampler: Sampler = "renoise"
    guidance: float = 1.0
    steps: int = 4
    shift: float = 5.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("cadence", self.cadence, get_args(Cadence)),
            ("commit", self.commit, get_args(Commit)),
            ("protected", self.protected, ("first", "last")),
            ("kv", self.kv, ("clean", "last_pass")),
            ("sampler", self.sampler, get_args(Sampler)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if not 1 <= self.guidance < float("inf"):
            raise ValueError(f"guidance={self.guidance}: give 1 for none, or a larger number")
        if self.hold_window is not None and (self.cadence == "plain" or self.fresh_noise):
            raise ValueError("hold_window holds the window of a cycle with one noise; leave out plain and fresh_noise")
        if self.kv == "last_pass" and (self.cadence != "plain" or self.guidance != 1):
            raise ValueError("kv='last_pass' writes what the last pass saw; give cadence='plain' and guidance=1")
        noise_levels(self.steps, self.shift)

    @classmethod
    def of_steps(cls, steps: int, cadence: Cadence = "window") -> LoopConfig:
        """A loop of this many steps with the sampler for them: ``renoise`` up to the default, ``euler`` above."""
        return cls(cadence=cadence, steps=steps, sampler="renoise" if steps <= cls.steps else "euler")

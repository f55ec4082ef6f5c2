"""Where a forward pass stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

#: What a pass is for. Only ``denoise`` may ever be served from cache; there is no switch for the other two.
Role = Literal["denoise", "kv_update", "prefill"]
ROLES = get_args(Role)

ActionLike = Tensor | np.ndarray[Any, Any] | Sequence[float] | float | None
FrameActions = Tensor | np.ndarray[Any, Any] | Sequence[Sequence[float]] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One forward pass of the model.

    Attributes:
        chunk: number of the chunk; every chunk of a stream has its own.
        index: which of the chunk's ``num_steps`` denoising passes this is, from 0.
        num_steps: denoising passes of this chunk.
        first: the index of the first pass that this model runs, above 0 where another model runs the earlier ones, or
            where denoising begins part-way.
        sigma: noise level, for the trace and for policies that read it.
        action: the newest commanded control, normalised per dimension, before any embedding; any shape, flattened.
        frame_actions: what each latent frame of this pass is told, ``[F, A]``, where that is more than the newest
            action: what the frames before were told, and what is intended for those to come.
        shown: which latent frame of the pass this chunk will show, from 0; None where it shows all of them.
        condition: whatever else steers the video (prompt, map, agents): a tensor, a mapping or sequence of tensors, or
            anything hashable. When it changes, the rest of the chunk is computed in full; so is a chunk that begins
            under another one where entries outlive their chunk.
        commits: whether the latents of this chunk are what the next KV update writes. True is the safe default.
        role: ``denoise``, ``kv_update`` (the pass that writes the persistent KV cache) or ``prefill``.
        stream: which video this is.
        branch: which guidance branch of it, such as ``"uncond"``.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    chunk: int
    index: int = 0
    num_steps: int = 1
    first: int = 0
    sigma: float | Tensor | None = None
    action: ActionLike = None
    frame_actions: FrameActions = None
    shown: int | None = None
    condition: Any = None
    commits: bool = True
    role: Role = "denoise"
    stream: str = "default"
    branch: str = ""
    #: The action as plain numbers: comparing these needs no device.
    action_vector: tuple[float, ...] | None = field(init=False, repr=False)
    #: The frames' actions as plain numbers.
    frame_vectors: tuple[tuple[float, ...], ...] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role={self.role!r} is not one of {', '.join(ROLES)}")
        if not (type(self.chunk) is type(self.index) is type(self.num_steps) is int):
            for name, value in (("chunk", self.chunk), ("index", self.index), ("num_steps", self.num_steps)):
                if not isinstance(value, int) or isinstance(value, bool):
                    raise ValueError(f"{name}={value!r} is not a whole number; pass an int")
        if not 0 <= self.index < self.num_steps:
            raise ValueError(
                f"index={self.index} is not one of num_steps={self.num_steps} passes; "
                f"pass num_steps=len(sigmas) and index counted from 0"
            )
        if not 0 <= self.first <= self.index:
            raise ValueError(f"first={self.first!r} lies after index={self.index}; it is the first index that runs")
        if not (isinstance(self.stream, str) and isinstance(self.branch, str)):
            name, given = ("branch", self.branch) if isinstance(self.stream, str) else ("stream", self.stream)
            raise ValueError(f"{name}={given!r} is not a name; pass a str")
        if self.sigma is not None:
            object.__setattr__(self, "sigma", float(self.sigma))
        object.__setattr__(self, "action_vector", None if self.action is None else _flatten(self.action))
        frames = None if self.frame_actions is None else _rows(self.frame_actions)
        object.__setattr__(self, "frame_vectors", frames)
        if self.shown is None:
            return
        if not isinstance(self.shown, int) or isinstance(self.shown, bool) or self.shown < 0:
            raise ValueError(f"shown={self.shown!r} is no latent frame; pass an int counted from 0, or None for all")
        if frames is not None and self.shown >= len(frames):
            raise ValueError(f"shown={self.shown} is not one of the {len(frames)} frames of frame_actions")

    @property
    def told(self) -> tuple[tuple[float, ...], ...] | None:
        """What the pass is told: a row per latent frame where `frame_actions` is given, else one row, the action."""
        if self.frame_vectors is not None:
            return self.frame_vectors
        return None if self.action_vector is None else (self.action_vector,)


def _flatten(action: ActionLike) -> tuple[float, ...]:
    vector = _numbers("action", action).flatten().tolist()
    if not all(map(math.isfinite, vector)):
        raise ValueError(f"action={vector} is not finite; pass the commanded control, normalised per dimension")
    return tuple(vector)


def _rows(frame_actions: FrameActions) -> tuple[tuple[float, ...], ...]:
    given = _numbers("frame_actions", frame_actions)
    if given.ndim != 2 or not len(given):
        raise ValueError(f"frame_actions {tuple(given.shape)} is not [F, A]; pass one action per latent frame")
    rows = tuple(map(tuple, given.tolist()))
    if not all(math.isfinite(value) for row in rows for value in row):
        raise ValueError(f"frame_actions={rows} is not finite; pass what each frame is told, normalised per dimension")
    return rows


def _numbers(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}={value!r} is not numbers; pass a tensor or a sequence of floats") from error

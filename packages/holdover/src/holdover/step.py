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
        condition: whatever else steers the video (prompt, map, agents): a tensor, a mapping or sequence of tensors, or
            anything hashable. When it changes, the chunk is computed in full.
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
    condition: Any = None
    commits: bool = True
    role: Role = "denoise"
    stream: str = "default"
    branch: str = ""
    #: The action as plain numbers: comparing these needs no device.
    action_vector: tuple[float, ...] | None = field(init=False, repr=False)

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


def _flatten(action: ActionLike) -> tuple[float, ...]:
    try:
        vector = torch.as_tensor(action, dtype=torch.float64).detach().flatten().tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"action={action!r} is not numbers; pass a tensor or a sequence of floats") from error
    if not all(map(math.isfinite, vector)):
        raise ValueError(f"action={vector} is not finite; pass the commanded control, normalised per dimension")
    return tuple(vector)

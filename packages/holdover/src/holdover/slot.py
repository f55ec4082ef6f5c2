"""The places of a model that a method may hold over, and how their tokens lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

#: What a policy's slots are: the blocks of the backbone, the layers within them, or the model as a whole, whose hidden
#: state is the noisy input.
Level = Literal["block", "sublayer", "model"]

#: What a slot is: the model as a whole; a block; within it attention over space (or space and time at once), over time,
#: or to another sequence; or an MLP, which works on each token by itself and takes nothing else with a row per token.
Kind = Literal["model", "block", "spatial", "temporal", "cross", "mlp"]

#: What a model returns of noisy latents: the clean latents x̂; the flow ``ε - x̂``, where ``x = (1-σ)·x̂ + σ·ε``; and
#: where ``x = √(1-σ²)·x̂ + σ·ε``, the noise ε or ``v = √(1-σ²)·ε - σ·x̂``. σ, the noise level, lies in (0, 1].
Prediction = Literal["clean", "flow", "noise", "v"]

#: Runs a slot for some of its tokens: see `Slot.part`.
PartOfSlot = Callable[
    [Callable[..., Any], Tensor | None, Mapping[str, Tensor], tuple[Any, ...], dict[str, Any]],
    tuple[Any, Mapping[str, Tensor]],
]


@dataclass(frozen=True)
class ViewGroup:
    """Cameras of one token grid, stacked: ``views`` grids of ``height`` x ``width`` tokens per latent frame.

    The tokens of a hidden state ``[B, L, C]`` are ordered frame, group, view, row, column.
    """

    name: str
    views: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("views", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of view group {self.name!r}: give at least 1")

    @property
    def tokens(self) -> int:
        """Tokens per latent frame."""
        return self.views * self.height * self.width


@dataclass(frozen=True)
class Slot:
    """A block and where its hidden state enters.

    Attributes:
        block: the module, or its name as `named_modules` gives it; that of the model itself is ``""``.
        hidden: the argument with the hidden state: its position, or its keyword.
        kind: what it is. A model may declare its blocks and the layers within them; a policy takes those of its level.
        method: which of the module's methods the slot is, for attention that is not a module of its own.
        returns: where in the tuple that the block returns the hidden state stands.
        beside: what a reused block returns beside its hidden state, as a function of the block and the arguments of its
            forward. By default it returns what it returned when last computed. Declare it for values that must not come
            twice, such as an update of the KV cache that the model applies later.
        kv_update: whether a call writes the persistent KV cache, as a function of the block and the arguments of its
            forward. Such a call within a ``denoise`` step is refused.
        writes_kv: the block writes keys and values in place in denoising passes too, so that it must not run twice.
            `audit` is refused for such a model.
        taps: tensors inside the block that a policy may read, by name. Each is a function of the block and the
            arguments of its forward. TeaCache reads ``modulated``, the timestep-modulated input. Of a model as a whole
            ``sigma`` is the noise level of this call: a tensor with a row per row of the batch, that goes with the
            latents. Declare it where ``step(sigma=...)`` does not say it.
        prediction: of a model as a whole: what it returns (`Prediction`). None: not known.
        rows: the arguments of the block's forward, positional and by keyword, for some rows of the batch: a function of
            their numbers and the arguments. None: a batch of several streams is computed whole if any row needs it.
        part: runs the block for some of its tokens, given what it remembers of the others. A function of the block's
            forward, the tokens, the memory and the arguments, which returns the output and the memory of all tokens
            after it. It may write into the memory that it is given. ``tokens`` are places in the flattened token axis,
            ``int64 [K]`` or a row of them per row of the batch, ``[B, K]``; the hidden state among the arguments and in
            the output holds these tokens alone, and whatever else has a row per token is for the function to take.
            ``tokens=None`` is the whole block, whose memory (keys and values, by name, with the batch on their first
            axis) begins there. A slot of kind ``"mlp"`` needs none. None: the block cannot compute a part.
    """

    block: nn.Module | str
    hidden: int | str = 0
    kind: Kind = "block"
    method: str = "forward"
    returns: int = 0
    beside: Callable[..., tuple[Any, ...]] | None = None
    kv_update: Callable[..., bool] | None = None
    writes_kv: bool = False
    taps: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict, hash=False)
    rows: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    part: PartOfSlot | None = None
    prediction: Prediction | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} of a slot is not one of {', '.join(get_args(Kind))}")
        if self.prediction not in (None, *get_args(Prediction)):
            kinds = ", ".join(get_args(Prediction))
            raise ValueError(f"prediction={self.prediction!r} of a slot is not one of {kinds}")
        if self.part is None and self.kind == "mlp":
            object.__setattr__(self, "part", by_token)

    @property
    def level(self) -> Level:
        """The level of the policies that take it."""
        return self.kind if self.kind in ("model", "block") else "sublayer"


def by_token(
    run: Callable[..., Any],
    tokens: Tensor | None,
    memory: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Mapping[str, Tensor]]:
    """`Slot.part` of a block that works on each token by itself and remembers nothing."""
    return run(*args, **kwargs), {}


def split_views(x_BLC: Tensor, groups: Sequence[ViewGroup]) -> list[Tensor]:
    """Tokens as pictures: per group ``[M, H, W, C]``, M pictures by batch, frame and view.

    Raises:
        ValueError: the tokens are not whole frames of the groups.
    """
    b, length, c = x_BLC.shape
    per_frame = sum(group.tokens for group in groups)
    if length % per_frame:
        raise ValueError(f"{length} tokens are not whole frames of the {per_frame} tokens of the given grids")
    x_BFNC = x_BLC.reshape(b, length // per_frame, per_frame, c)
    parts = torch.split(x_BFNC, [group.tokens for group in groups], 2)
    return [part.reshape(-1, g.height, g.width, c) for part, g in zip(parts, groups, strict=True)]


def join_views(parts: Sequence[Tensor], groups: Sequence[ViewGroup], b: int) -> Tensor:
    """The reverse of `split_views`, ``[B, L, C]``."""
    joined = [p.reshape(b, -1, g.tokens, p.shape[-1]) for p, g in zip(parts, groups, strict=True)]
    return torch.cat(joined, 2).flatten(1, 2)


def check_grids(option: str, groups: Sequence[object]) -> None:
    """Raise a ValueError unless an option holds token grids."""
    if not all(isinstance(group, ViewGroup) for group in groups):
        raise ValueError(f"{option}={groups!r} holds what is no token grid; give holdover.ViewGroup objects")

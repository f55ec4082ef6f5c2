"""A bidirectional transformer over a window of frames, of which some tokens can be computed given the others' K/V."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdover import Slot

FRAMES, PER_FRAME, DIM, BLOCKS = 4, 6, 16, 3


class WindowBlock(nn.Module):
    """Attention over all tokens of the window, and an MLP. ``at`` are the tokens given, ``others`` all tokens' K/V."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mlp = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.seen: list[int] = []

    def forward(
        self,
        x: Tensor,
        *,
        at: Tensor | None = None,
        others: Mapping[str, Tensor] | None = None,
        kept: dict[str, Tensor] | None = None,
    ) -> Tensor:
        self.seen.append(x.shape[1])
        q, k, v = self.qkv(F.layer_norm(x, (DIM,))).chunk(3, -1)
        if at is not None and others is not None:
            places = (at if at.dim() == 2 else at[None].expand(len(x), -1))[..., None].expand(-1, -1, DIM)
            k, v = others["k"].scatter_(1, places, k), others["v"].scatter_(1, places, v)
        if kept is not None:
            kept |= {"k": k, "v": v}
        y = x + F.scaled_dot_product_attention(q, k, v)
        return y + self.mlp(F.gelu(y))


def part(
    run: Callable[..., Any],
    tokens: Tensor | None,
    memory: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Mapping[str, Tensor]]:
    kept: dict[str, Tensor] = {}
    told = {} if tokens is None else {"at": tokens, "others": memory}
    return run(*args, **kwargs, **told, kept=kept), kept


class Window(nn.Module):
    """Runs its blocks one after the other on ``[B, FRAMES * PER_FRAME, DIM]``."""

    def __init__(self, *, parts: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(WindowBlock() for _ in range(BLOCKS))
        self.parts = parts
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def holdover_slots(self) -> list[Slot]:
        def rows(numbers: Any, x: Tensor, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (x[numbers],), kwargs

        return [Slot(block, part=part if self.parts else None, rows=rows) for block in self.blocks]


def tokens_of(frame: int) -> Tensor:
    return torch.arange(frame * PER_FRAME, (frame + 1) * PER_FRAME)


class NaiveFrontier:
    """The same by hand: all tokens at the first chunk, then those of one frame, given the K/V that all had last."""

    def __init__(self, model: Window) -> None:
        self.model = model
        self.memory: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.residual: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, index: int, frame: int | None) -> Tensor:
        hidden = x if frame is None else x[:, tokens_of(frame)]
        for number, block in enumerate(self.model.blocks):
            kept: dict[str, Tensor] = {}
            told = {} if frame is None else {"at": tokens_of(frame), "others": self.memory[index, number]}
            hidden = block(hidden, **told, kept=kept)
            self.memory[index, number] = kept
        if frame is None:
            self.residual[index] = hidden - x
            return hidden
        y = x + self.residual[index]
        y[:, tokens_of(frame)] = hidden
        return y

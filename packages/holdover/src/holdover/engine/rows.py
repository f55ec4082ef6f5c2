"""The rows of a batch: one for all where a pass is of a single stream, one per stream where it is batched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holdover.engine.blocks import Block


class Rows:
    """Takes tensors apart, a row per stream of a batched pass, and puts them together again."""

    def __init__(self, batched: bool) -> None:
        self.batched = batched

    def split(self, x: Tensor) -> Sequence[Tensor]:
        return torch.split(x, 1) if self.batched else (x,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)) if self.batched else parts[0]

    def tokens(self, tokens: Tensor) -> Tensor:
        """The tokens of a row, ``[1, K]`` in a batched pass."""
        return tokens[None] if self.batched and tokens.dim() == 1 else tokens

    def memory(
        self, at: int, rows: int, memory: Mapping[int, Mapping[str, Tensor]]
    ) -> Mapping[int, Mapping[str, Tensor]]:
        """The share of one of ``rows`` rows in blocks' memory, whose tensors have the rows on their first axis."""
        if not self.batched:
            return memory
        return {b: {name: t.chunk(rows)[at].clone() for name, t in own.items()} for b, own in memory.items()}

    def extras(self, at: int, rows: int, block: Block, items: tuple[Any, ...]) -> tuple[Any, ...]:
        """The share of one of ``rows`` rows in what a block returned beside its hidden state."""
        if not self.batched:
            return items
        for item in items:
            if isinstance(item, Tensor) and (item.dim() == 0 or item.shape[0] != rows):
                raise ValueError(
                    f"block {block.name!r} returns a tensor of shape {list(item.shape)} beside its hidden state, which "
                    f"has no row per stream; give each stream a pass of its own"
                )
        return tuple(item[at : at + 1] if isinstance(item, Tensor) else item for item in items)


def take_tokens(x: Tensor, tokens: Tensor) -> Tensor:
    """Some tokens of a hidden state ``[B, ..., C]``: ``[B, K, C]``."""
    x_BLC = x.flatten(1, -2)
    return x_BLC.gather(1, _places(tokens, x_BLC))


def put_tokens(y: Tensor, tokens: Tensor, fresh: Tensor) -> Tensor:
    """A hidden state with some of its tokens replaced by ``fresh [B, K, C]``."""
    y_BLC = y.flatten(1, -2)
    return y_BLC.scatter(1, _places(tokens, y_BLC), fresh.to(y.dtype)).reshape(y.shape)


def _places(tokens: Tensor, x_BLC: Tensor) -> Tensor:
    """Tokens as an index ``[B, K, C]`` into the token axis."""
    rows = tokens if tokens.dim() == 2 else tokens[None].expand(len(x_BLC), -1)
    return rows[..., None].expand(-1, -1, x_BLC.shape[-1])

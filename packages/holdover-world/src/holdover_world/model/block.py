"""A block of the world model, and what the blocks of one pass share.

Shape suffixes: as in `holdover_world.model.transformer`; K tokens of a part, f latent frames of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdover_world.config import WorldConfig
from holdover_world.model.kv_cache import KVBatch, KVCache
from holdover_world.model.rotary import Table, TemporalOrder, rotate

#: Large, so that the norms are nearly linear for small activations. Brightness and contrast then pass a norm without
#: outlier channels, which X-Cache's deviation test (largest element over mean) would take for change.
NORM_EPS = 1.0
#: Of the norms of queries and keys.
RMS_EPS = 1e-6


#: Keys and values by name, ``"k0"`` and ``"v0"`` of the first group: ``[B, V, H, S, D]``.
Memory = dict[str, Tensor]


@dataclass(frozen=True)
class Pass:
    """What the blocks of one forward pass share.

    Attributes:
        modulation_BF6C: from noise level and actions.
        order: of the tokens in temporal attention.
        rotary_temporal: the table of these tokens, ``[F, N, 1, 1, D]``, or ``[B, F, N, 1, 1, D]`` if the rows start at
            different times.
        rotary_cross: the table over viewing directions, ``[N, 1, 1, D]``.
        frames_Bf: of a part: which latent frames of the window it is.
        shown: per row the one latent frame that is conditioned, if the others are not.
        complete: what enters the first block with all of them conditioned, ``[B, L, C]``.
        parts: what was made of this for rows and for parts, to be made once for all blocks.
    """

    modulation_BF6C: Tensor
    order: TemporalOrder
    rotary_temporal: Table
    rotary_cross: Table
    kv: KVCache | KVBatch | None
    write: bool
    frames_Bf: Tensor | None = None
    shown: Sequence[int] | None = None
    complete: Callable[[], Tensor] | None = None
    parts: dict[Any, tuple[Any, Pass]] = field(default_factory=dict, compare=False, repr=False)

    def take(self, rows: Sequence[int]) -> Pass:
        """The same for some rows of the batch."""
        key = tuple(rows)
        if key not in self.parts:
            cos, sin = self.rotary_temporal
            table = (cos, sin) if cos.dim() == 5 else (cos[rows], sin[rows])
            kv = self.kv.take(rows) if self.kv else None
            taken = replace(
                self,
                modulation_BF6C=self.modulation_BF6C[rows],
                rotary_temporal=table,
                kv=kv,
                shown=self.shown and [self.shown[row] for row in rows],
                complete=self.complete and partial(_some, self.complete, rows),
                parts={},
            )
            self.parts[key] = rows, taken
        return self.parts[key][1]

    def part(self, tokens: Tensor) -> Pass:
        """The same for some latent frames of the window, given by their tokens, ``[K]`` or ``[B, K]``.

        Raises:
            ValueError: the tokens are not whole latent frames.
        """
        key = id(tokens)
        if key not in self.parts:
            n, b = len(self.rotary_cross[0]), len(self.modulation_BF6C)
            frames_Bf = torch.div(tokens[..., ::n], n, rounding_mode="floor").expand(b, -1)
            whole = (frames_Bf[..., None] * n + torch.arange(n, device=tokens.device)).flatten(1)
            if not torch.equal(whole, tokens.expand(b, -1)):
                raise ValueError(
                    "a part of the world model is whole latent frames; give all tokens of a frame in order"
                )
            rows = torch.arange(b, device=tokens.device)[:, None]
            cos, sin = (t[frames_Bf] if t.dim() == 5 else t[rows, frames_Bf] for t in self.rotary_temporal)
            conditioned = self.shown is not None and frames_Bf.tolist() == [[frame] for frame in self.shown]
            complete = None if conditioned else self.complete
            taken = replace(
                self,
                modulation_BF6C=self.modulation_BF6C[rows, frames_Bf],
                rotary_temporal=(cos, sin),
                frames_Bf=frames_Bf,
                complete=complete and partial(_some, complete, (rows, tokens.expand(b, -1))),
                parts={},
            )
            self.parts[key] = tokens, taken  # the tokens are kept, so that nothing else can have their id
        return self.parts[key][1]

    def recall(self, memory: Memory, group: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, V, H, S, D]`` of the whole window; those of this pass are written into the memory."""
        for name, made in ((f"k{group}", k), (f"v{group}", v)):
            if self.frames_Bf is None:
                memory[name] = made.contiguous()  # and no view of more
                continue
            per_frame = made.shape[3] // self.frames_Bf.shape[1]
            for held, new, frames in zip(memory[name], made, self.frames_Bf, strict=True):
                held.unflatten(2, (-1, per_frame)).index_copy_(2, frames, new.unflatten(2, (-1, per_frame)))
        return memory[f"k{group}"], memory[f"v{group}"]


def _some(complete: Callable[[], Tensor], at: Any) -> Tensor:
    return complete()[at]


def take_rows(rows: Sequence[int], hidden_BLC: Tensor, shared: Pass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block for some rows of the batch."""
    return (hidden_BLC[rows], shared.take(rows)), {}


def compute_part(
    run: Callable[..., Any],
    tokens: Tensor | None,
    memory: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Mapping[str, Tensor]]:
    """`Slot.part` of a block: whole latent frames, given the keys and values of the others."""
    hidden, shared = args
    known = dict(memory)
    return run(hidden, shared if tokens is None else shared.part(tokens), known), known


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over ``[*, H, S, D]``. The queries are already scaled. Four axes take the fused kernel.

    On a CPU in bfloat16 plain matrix products are about three times as fast as PyTorch's fused kernel. Queries and keys
    are normalised, so the scores are bounded and need no maximum subtracted before the exponential.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, scale=1)
    weights = (q @ k.transpose(-1, -2)).exp_()
    return weights @ v / weights.sum(-1, keepdim=True)


class Block(nn.Module):
    """Attention over time or across views, and an MLP. Both are modulated per latent frame."""

    def __init__(self, config: WorldConfig, index: int) -> None:
        super().__init__()
        c = config.channels
        self.config, self.index, self.temporal = config, index, index % 2 == 0
        self.table_6C = nn.Parameter(torch.zeros(6, c))
        self.norm1 = nn.LayerNorm(c, elementwise_affine=False, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(c, elementwise_affine=False, eps=NORM_EPS)
        self.qkv = nn.Linear(c, 3 * c, bias=False)
        head = c // config.heads
        self.norm_q = nn.RMSNorm(head, eps=RMS_EPS)
        self.norm_k = nn.RMSNorm(head, eps=RMS_EPS)
        nn.init.constant_(self.norm_q.weight, head**-0.5)  # the scale of the dot product, where learning starts
        self.out = nn.Linear(c, c, bias=False)
        self.up = nn.Linear(c, config.mlp_ratio * c)
        self.down = nn.Linear(config.mlp_ratio * c, c)

    def forward(self, hidden_BLC: Tensor, shared: Pass, memory: Memory | None = None) -> Tensor:
        """One block. Keys and values of temporal attention are kept in the memory, and a part takes others' from it."""
        if self.index == 0 and shared.complete is not None:
            hidden_BLC = shared.complete()
        x_BFNC = hidden_BLC.unflatten(1, (-1, self.config.tokens))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(shared)
        y_BFNC = torch.addcmul(shift1, self.norm1(x_BFNC), 1 + scale1)
        attended = self.attend_temporal(y_BFNC, shared, memory) if self.temporal else self.attend_cross(y_BFNC, shared)
        x_BFNC = torch.addcmul(x_BFNC, gate1, self.out(attended))
        mlp = self.mlp(torch.addcmul(shift2, self.norm2(x_BFNC), 1 + scale2))
        return torch.addcmul(x_BFNC, gate2, mlp).view(hidden_BLC.shape)

    def modulation(self, shared: Pass) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention and of the MLP, each ``[B, F, 1, C]``."""
        return (shared.modulation_BF6C + self.table_6C).unsqueeze(2).unbind(3)

    def modulated(self, hidden_BLC: Tensor, shared: Pass) -> Tensor:
        """The input of the attention, ``[B, L, C]``: the tap of methods such as TeaCache."""
        shift, scale, *_ = self.modulation(shared)
        x_BFNC = hidden_BLC.unflatten(1, (-1, self.config.tokens))
        return torch.addcmul(shift, self.norm1(x_BFNC), 1 + scale).flatten(1, 2)

    def mlp(self, x: Tensor) -> Tensor:
        """The MLP, on each token ``[..., C]`` alone."""
        result: Tensor = self.down(F.gelu(self.up(x)))
        return result

    def attend_temporal(self, x_BFNC: Tensor, shared: Pass, memory: Memory | None = None) -> Tensor:
        """Attention of each camera alone, over the window and the windows in the KV cache."""
        b, f, _, c = x_BFNC.shape
        qk, values = self._project(x_BFNC.index_select(2, shared.order.tokens_N), shared.rotary_temporal)
        made = []
        for g, (tokens, views) in enumerate(shared.order.groups):
            q, k, v = (
                t[:, :, tokens]
                .unflatten(2, (views, -1))
                .permute(0, 2, 4, 1, 3, 5)
                .reshape(b, views, t.shape[3], -1, t.shape[4])
                for t in (qk[..., 0, :, :], qk[..., 1, :, :], values)
            )
            if memory is not None:
                k, v = shared.recall(memory, g, k, v)
            held = shared.kv.get(self.index, g) if shared.kv else None
            if shared.kv and shared.write:
                shared.kv.stage(self.index, g, k, v)
            if held:
                k, v = (torch.cat([old, new], 3) for old, new in zip(held, (k, v), strict=True))
            out = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
            made.append(out.transpose(1, 2).reshape(b, views, f, -1, c).transpose(1, 2).flatten(2, 3))
        return torch.cat(made, 2).index_select(2, shared.order.places_N)

    def attend_cross(self, x_BFNC: Tensor, shared: Pass) -> Tensor:
        """Attention of all cameras at one instant, by viewing direction, so that overlapping cameras agree."""
        qk, values = self._project(x_BFNC, shared.rotary_cross)
        q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (qk[..., 0, :, :], qk[..., 1, :, :], values))
        return attention(q, k, v).transpose(1, 2).reshape(x_BFNC.shape)

    def _project(self, x_BFNC: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[B, F, N, 2, H, D]``, normalised and rotated, and values ``[B, F, N, H, D]``."""
        qkv = self.qkv(x_BFNC).unflatten(-1, (3, self.config.heads, -1))
        weights = torch.stack((self.norm_q.weight, self.norm_k.weight))
        qk = F.rms_norm(qkv[..., :2, :, :], qkv.shape[-1:], eps=RMS_EPS) * weights[:, None]
        return rotate(qk, table), qkv[..., 2, :, :]

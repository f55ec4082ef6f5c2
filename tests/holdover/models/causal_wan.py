"""Tiny chunk-causal Wans of our own: the signatures of the repositories' blocks, and the way they treat the KV cache.

One token per latent pixel. Shapes: B batch, L tokens, C channels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, DIM, BLOCKS, ROWS, COLUMNS = 3, 8, 4, 2, 3
PER_FRAME = ROWS * COLUMNS
#: Latent frames of a chunk, and chunks that the KV cache has room for.
CHUNK, CAPACITY = 4, 3
TOKENS = CHUNK * PER_FRAME
#: Frames of the video, and so actions, per latent frame; the first latent frame has one.
RATE = 4


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class Base(nn.Module):
    """What all blocks do but for attention."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.norm1 = nn.LayerNorm(DIM, elementwise_affine=False)
        self.modulation = nn.Parameter(torch.randn(1, 6, DIM) / DIM**0.5)
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.cross_k, self.cross_v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.ffn = nn.Linear(DIM, DIM)

    def normed(self, x: Tensor, e: Tensor) -> Tensor:
        e = self.modulation.unsqueeze(1) + e
        frames = self.norm1(x).unflatten(1, (e.shape[1], -1))
        return (frames * (1 + e[:, :, 1:2]) + e[:, :, 0:1]).flatten(1, 2)

    def rest(self, x: Tensor, y: Tensor, context: Tensor, crossattn_cache: dict[str, Any] | None) -> Tensor:
        x = x + self.o(y)
        if crossattn_cache is None or not crossattn_cache["is_init"]:
            k, v = self.cross_k(context), self.cross_v(context)
            if crossattn_cache is not None:
                crossattn_cache.update(k=k, v=v, is_init=True)
        else:
            k, v = crossattn_cache["k"], crossattn_cache["v"]
        x = x + attend(self.q(x), k, v)
        return x + torch.tanh(self.ffn(x))


def place(kv: dict[str, Any], start: int, new: int) -> tuple[int, int, int]:
    """Where new tokens go: begin and end in the rolling cache, and how many old ones must leave."""
    end, local = start + new, int(kv["local_end_index"]) + start + new - int(kv["global_end_index"])
    evicted = max(0, local - kv["k"].shape[1]) if end > int(kv["global_end_index"]) else 0
    return local - evicted - new, local - evicted, evicted


def write(kv: dict[str, Any], k: Tensor, v: Tensor, start: int) -> int:
    """In place: roll if there is no room, insert, move the ends on."""
    begin, end, evicted = place(kv, start, k.shape[1])
    for name, value in (("k", k), ("v", v)):
        if evicted:
            kv[name][:, :-evicted] = kv[name][:, evicted:].clone()
        kv[name][:, begin:end] = value
    for name, value in (("global_end_index", start + k.shape[1]), ("local_end_index", end)):
        if isinstance(kv[name], Tensor):
            kv[name].fill_(value)
        else:
            kv[name] = value
    return end


class SelfForcingBlock(Base):
    """Self-Forcing: noisy and clean passes alike write K/V in place."""

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask,
        kv_cache=None, crossattn_cache=None, current_start=0, cache_start=None,
    ):  # fmt: skip
        h = self.normed(x, e)
        end = write(kv_cache, self.k(h), self.v(h), current_start)
        y = attend(self.q(h), kv_cache["k"][:, :end], kv_cache["v"][:, :end])
        return self.rest(x, y, context, crossattn_cache)


class KreaBlock(SelfForcingBlock):
    """Krea realtime: with a mask, K/V of the whole context are written anew from the cache's beginning."""

    def forward(self, x, *args, block_mask=None, kv_cache=None, **kwargs):
        if block_mask is not None:
            kv_cache.update(global_end_index=0, local_end_index=0)
            kwargs["current_start"] = 0
        return super().forward(x, *args, block_mask=block_mask, kv_cache=kv_cache, **kwargs)

    def fuse_projections(self) -> None: ...


class CausVidBlock(Base):
    """CausVid: as above, at absolute places."""

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask,
        kv_cache=None, crossattn_cache=None, current_start=0, current_end=0,
    ):  # fmt: skip
        h = self.normed(x, e)
        kv_cache["k"][:, current_start:current_end] = self.k(h)
        kv_cache["v"][:, current_start:current_end] = self.v(h)
        y = attend(self.q(h), kv_cache["k"][:, :current_end], kv_cache["v"][:, :current_end])
        return self.rest(x, y, context, crossattn_cache)


class LongLiveBlock(Base):
    """LongLive: attends over a copy and returns the update, which the model applies when all blocks have run.

    With a mask, K/V are written anew and the ends stay. The mask is an argument of that one call.
    """

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask,
        kv_cache=None, crossattn_cache=None, current_start=0, cache_start=None,
    ):  # fmt: skip
        h = self.normed(x, e)
        k, v = self.k(h), self.v(h)
        copy = {name: value.clone() for name, value in kv_cache.items()}
        copy |= self.ends(kv_cache)
        begin, end, evicted = place(copy, current_start, k.shape[1])
        write(copy, k, v, current_start)
        y = attend(self.q(h), copy["k"][:, :end], copy["v"][:, :end])
        update = {"new_k": k, "new_v": v, "at": (begin, end, evicted), "is_recompute": block_mask is not None}
        return self.rest(x, y, context, crossattn_cache), (current_start + x.shape[1], end, update)

    def ends(self, kv_cache: dict[str, Any]) -> dict[str, Any]:
        return {}


class LongLive10Block(Base):
    """LongLive, branch v1.0: a pass that does not move the end leaves the ends as they are, and spares the sink.

    So does the clean pass, but for a chunk at the beginning. After a switch of prompts K/V are written anew, in a pass
    that may be told to write the sink as well.
    """

    def __init__(self, number: int, sink: int = CHUNK) -> None:
        super().__init__(number)
        self.self_attn = nn.Module()
        self.self_attn.sink_size = sink

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask,
        kv_cache=None, crossattn_cache=None, current_start=0, cache_start=None, sink_recache_after_switch=False,
    ):  # fmt: skip
        h = self.normed(x, e)
        k, v = self.k(h), self.v(h)
        sink, current_end = self.self_attn.sink_size * PER_FRAME, current_start + x.shape[1]
        again = current_end <= int(kv_cache["global_end_index"]) and current_start > 0
        begin, end, evicted = place(kv_cache, current_start, k.shape[1])
        first = max(begin, sink) if again and not sink_recache_after_switch else begin
        update = {
            "new_k": k[:, first - begin :], "new_v": v[:, first - begin :], "at": (first, end, evicted), "sink": sink,
            "is_recompute": again,
        }  # fmt: skip
        copy = {name: kv_cache[name].clone() for name in ("k", "v")}
        insert(copy, update)
        window = slice(max(sink, end - CAPACITY * TOKENS + sink), end)
        keys, values = (torch.cat([copy[name][:, : min(sink, end)], copy[name][:, window]], 1) for name in ("k", "v"))
        return self.rest(x, attend(self.q(h), keys, values), context, crossattn_cache), (current_end, end, update)


def insert(kv: dict[str, Any], update: dict[str, Any]) -> None:
    """Roll what lies behind the sink if there is no room, and insert."""
    (begin, end, evicted), sink = update["at"], update.get("sink", 0)
    for name in ("k", "v"):
        if evicted:
            kv[name][:, sink:-evicted] = kv[name][:, sink + evicted :].clone()
        kv[name][:, begin:end] = update[f"new_{name}"]


class StreamDiffusionBlock(Base):
    """StreamDiffusionV2: noisy K/V stay. Once the cache is full, each layer's queue of places says what to evict."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.evict = [end * TOKENS for end in range(2, CAPACITY + 1)]

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask,
        kv_cache=None, crossattn_cache=None, current_start=0, current_end=0, causal_rope_cache=None,
    ):  # fmt: skip
        h, end = self.normed(x, e), int(current_start) + x.shape[1]
        if end > kv_cache["k"].shape[1]:
            end = self.evict[0]
            if kv_cache["current_step"] > 1:
                kv_cache["current_step"] -= 1
            else:
                self.evict.append(self.evict.pop(0))
                kv_cache["current_step"] = kv_cache["total_steps"]
            kv_cache["filled"] = kv_cache["k"].shape[1]
        else:
            kv_cache["filled"] = max(end, kv_cache.get("filled", 0))
        kv_cache["k"][:, end - x.shape[1] : end] = self.k(h)
        kv_cache["v"][:, end - x.shape[1] : end] = self.v(h)
        filled = kv_cache["filled"]
        y = attend(self.q(h), kv_cache["k"][:, :filled], kv_cache["v"][:, :filled])
        return self.rest(x, y, context, crossattn_cache)


class LongLive2Block(LongLiveBlock):
    """LongLive 2: every block goes by the ends of the first block's cache, which are published before a pass."""

    published: ClassVar[dict[str, Any]] = {}

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask,
        kv_cache=None, crossattn_cache=None, current_start=0, cache_start=None, use_relative_rope=False,
    ):  # fmt: skip
        return super().forward(
            x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask, kv_cache, crossattn_cache,
            current_start,
        )  # fmt: skip

    def ends(self, kv_cache: dict[str, Any]) -> dict[str, Any]:
        return {name: value.clone() for name, value in self.published.items()}


class RollingForcingBlock(Base):
    """Rolling Forcing: of the chunks in flight only the first is written; a pass of its own writes it clean."""

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask, updating_cache=False,
        kv_cache=None, crossattn_cache=None, current_start=0, cache_start=None,
    ):  # fmt: skip
        h = self.normed(x, e)
        k, v = self.k(h), self.v(h)
        end = write(kv_cache, k[:, :TOKENS], v[:, :TOKENS], current_start)
        keys, values = (torch.cat([kv_cache[n][:, :end], new[:, TOKENS:]], 1) for n, new in (("k", k), ("v", v)))
        return self.rest(x, attend(self.q(h), keys, values), context, crossattn_cache)


class MatrixGameBlock(Base):
    """Matrix-Game 2: action modules, here in every other block, with K/V of their own: one of each per latent frame."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.keys, self.mouse = nn.Linear(2 * RATE, DIM), nn.Linear(2 * RATE, DIM)

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, block_mask, block_mask_mouse, block_mask_keyboard,
        num_frame_per_block=3, use_rope_keyboard=False, mouse_cond=None, keyboard_cond=None, kv_cache=None,
        kv_cache_mouse=None, kv_cache_keyboard=None, crossattn_cache=None, current_start=0, cache_start=None,
        context_lens=None,
    ):  # fmt: skip
        h = self.normed(x, e)
        end = write(kv_cache, self.k(h), self.v(h), current_start)
        x = self.rest(x, attend(self.q(h), kv_cache["k"][:, :end], kv_cache["v"][:, :end]), context, crossattn_cache)
        if self.number % 2 == 0:
            start, frames = current_start // PER_FRAME, x.shape[1] // PER_FRAME
            for layer, cond, kv in (
                (self.keys, keyboard_cond, kv_cache_keyboard),
                (self.mouse, mouse_cond, kv_cache_mouse),
            ):
                assert (cond.shape[1] - 1) // RATE + 1 == start + frames  # the clip's actions up to this chunk
                padded = torch.cat([cond[:, :1].expand(-1, RATE - 1, -1), cond], 1).unflatten(1, (-1, RATE))
                said = layer(padded[:, -frames:].flatten(2))
                end = write(kv, said, said + x.unflatten(1, (frames, -1)).mean(2), start)
                x = x + attend(x, kv["k"][:, :end], kv["v"][:, :end])
        return x


class CausalWanModel(nn.Module):
    """Latents ``[B, C, F, H, W]`` in, a prediction out. ``t [B, F]`` says how much noise there is."""

    patch_size = (1, 1, 1)
    num_frame_per_block = CHUNK
    #: Set before a pass that writes the K/V of the whole context anew. Krea takes it back, LongLive v1.0 does not.
    block_mask: Any = None

    def __init__(self, block: type[Base]) -> None:
        super().__init__()
        self.patch = nn.Linear(CHANNELS, DIM)
        self.time = nn.Linear(1, 6 * DIM)
        self.blocks = nn.ModuleList(block(number) for number in range(BLOCKS))
        self.head = nn.Linear(DIM, CHANNELS)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward_inference(*args, **kwargs)

    def _forward_inference(
        self, x, t, context=None, visual_context=None, seq_len=None, kv_cache=None, crossattn_cache=None,
        block_mask=None, **places,
    ):  # fmt: skip
        context = visual_context if context is None else context
        h = self.patch(x.flatten(2).transpose(1, 2))
        e = self.time(torch.log1p(t[..., None].float())).unflatten(-1, (6, DIM))
        updates = []
        for number, block in enumerate(self.blocks):
            per_block = {name: value[number] for name, value in places.items() if name.startswith("kv_cache")}
            h = block(
                h, e=e, seq_lens=None, grid_sizes=None, freqs=None, context=context,
                block_mask=self.block_mask if block_mask is None else block_mask,
                **({"block_mask_mouse": None, "block_mask_keyboard": None} if per_block else {"context_lens": None}),
                kv_cache=kv_cache[number],
                crossattn_cache=crossattn_cache[number],
                **{**places, **per_block},
            )  # fmt: skip
            if isinstance(h, tuple):
                h, update = h
                updates.append((number, update))
        if updates:
            self._apply_cache_updates(kv_cache, updates)
        return torch.tanh(self.head(h)).transpose(1, 2).unflatten(2, x.shape[2:])


class LongLiveModel(CausalWanModel):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        LongLive2Block.published = {
            name: kwargs["kv_cache"][0][name].clone() for name in ("global_end_index", "local_end_index")
        }
        return super().forward(*args, **kwargs)

    def _apply_cache_updates(self, kv_cache: list[dict[str, Any]], updates: list[Any]) -> None:
        for number, (current_end, local_end_index, update) in updates:
            kv = kv_cache[number]
            if update is not None:
                insert(kv, update)
            if update is None or not update["is_recompute"]:
                kv["global_end_index"].fill_(current_end)
                kv["local_end_index"].fill_(local_end_index)


LongLiveModel.__name__ = "CausalWanModel"

"""The chunk-causal repositories that cannot be installed, as contracts: what their blocks take, return and write.

Tiny modules of our own with the signatures of their blocks and the way they treat the KV cache; one token per latent
pixel. Shapes: B batch, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, DIM, BLOCKS, ROWS, COLUMNS = 3, 8, 4, 2, 3
PER_FRAME = ROWS * COLUMNS
#: Latent frames of a chunk, and chunks that the KV cache has room for.
CHUNK, CAPACITY = 4, 3
TOKENS = CHUNK * PER_FRAME


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
    """Self-Forcing and Krea realtime: noisy and clean passes alike write K/V in place."""

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask,
        kv_cache=None, crossattn_cache=None, current_start=0, cache_start=None,
    ):  # fmt: skip
        h = self.normed(x, e)
        end = write(kv_cache, self.k(h), self.v(h), current_start)
        y = attend(self.q(h), kv_cache["k"][:, :end], kv_cache["v"][:, :end])
        return self.rest(x, y, context, crossattn_cache)


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
    """LongLive: attends over a copy and returns the update, which the model applies when all blocks have run."""

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask,
        kv_cache=None, crossattn_cache=None, current_start=0, cache_start=None,
    ):  # fmt: skip
        h = self.normed(x, e)
        k, v = self.k(h), self.v(h)
        copy = {name: value.clone() for name, value in kv_cache.items()}
        end = write(copy, k, v, current_start)
        y = attend(self.q(h), copy["k"][:, :end], copy["v"][:, :end])
        update = {"new_k": k, "new_v": v, "current_start": current_start}
        return self.rest(x, y, context, crossattn_cache), (current_start + x.shape[1], end, update)


class RollingForcingBlock(Base):
    """Rolling Forcing: of the chunks in flight only the first is written; a pass of its own writes it clean."""

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask,
        kv_cache=None, crossattn_cache=None, current_start=0, cache_start=None, updating_cache=False,
    ):  # fmt: skip
        h = self.normed(x, e)
        k, v = self.k(h), self.v(h)
        end = write(kv_cache, k[:, :TOKENS], v[:, :TOKENS], current_start)
        keys, values = (torch.cat([kv_cache[n][:, :end], new[:, TOKENS:]], 1) for n, new in (("k", k), ("v", v)))
        return self.rest(x, attend(self.q(h), keys, values), context, crossattn_cache)


class MatrixGameBlock(Base):
    """Matrix-Game 2: action modules with K/V of their own, here in every other block."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.keys, self.mouse = nn.Linear(2, DIM), nn.Linear(2, DIM)

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
            first = current_start // PER_FRAME
            for layer, cond, kv in (
                (self.keys, keyboard_cond, kv_cache_keyboard),
                (self.mouse, mouse_cond, kv_cache_mouse),
            ):
                said = layer(cond[:, first : first + x.shape[1] // PER_FRAME]).repeat_interleave(PER_FRAME, 1)
                end = write(kv, said, said + x, current_start)
                x = x + attend(x, kv["k"][:, :end], kv["v"][:, :end])
        return x


class WorldPlayBlock(Base):
    """HY-WorldPlay: noisy passes read the K/V of a context; a pass with ``cache_vision`` returns what to write."""

    def forward(self, bi_inference=True, ar_txt_inference=False, ar_vision_inference=False, **kwargs):
        assert ar_vision_inference
        return self.forward_vision(**kwargs)

    def forward_vision(
        self, img, vec, freqs_cis, attn_param, block_idx, viewmats, Ks, kv_cache=None, cache_vision=False,
    ):  # fmt: skip
        h = self.normed(img, vec)
        k, v = self.k(h), self.v(h)
        held = kv_cache[block_idx]
        keys, values = (
            (k, v) if cache_vision else (torch.cat([held["k_vision"], k], 1), torch.cat([held["v_vision"], v], 1))
        )
        img = self.rest(img, attend(self.q(h), keys, values), viewmats, None)
        return img, {"k_vision": k, "v_vision": v} if cache_vision else {}


class CausalWanModel(nn.Module):
    """Latents ``[B, C, F, H, W]`` in, predicted clean latents out. ``t [B, F]`` is the noise level, 0 to 1."""

    patch_size = (1, 1, 1)

    def __init__(self, block: type[Base]) -> None:
        super().__init__()
        self.patch = nn.Linear(CHANNELS, DIM)
        self.time = nn.Linear(1, 6 * DIM)
        self.blocks = nn.ModuleList(block(number) for number in range(BLOCKS))
        self.head = nn.Linear(DIM, CHANNELS)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward_inference(*args, **kwargs)

    def _forward_inference(self, x, t, context, seq_len=None, kv_cache=None, crossattn_cache=None, **places):
        h = self.patch(x.flatten(2).transpose(1, 2))
        e = self.time(t[..., None]).unflatten(-1, (6, DIM))
        updates = []
        for number, block in enumerate(self.blocks):
            per_block = {name: value[number] for name, value in places.items() if name.startswith("kv_cache")}
            h = block(
                h, e=e, seq_lens=None, grid_sizes=None, freqs=None, context=context, block_mask=None,
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
    def _apply_cache_updates(self, kv_cache: list[dict[str, Any]], updates: list[Any]) -> None:
        for number, (current_end, local_end_index, update) in updates:
            kv = kv_cache[number]
            if update is not None:
                write(kv, update["new_k"], update["new_v"], update["current_start"])
            kv["global_end_index"].fill_(current_end)
            kv["local_end_index"].fill_(local_end_index)


LongLiveModel.__name__ = "CausalWanModel"


class HunyuanVideo_1_5_DiffusionTransformer(nn.Module):  # noqa: N801
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(CHANNELS, DIM)
        self.time = nn.Linear(1, 6 * DIM)
        self.double_blocks = nn.ModuleList(WorldPlayBlock(number) for number in range(BLOCKS))
        self.head = nn.Linear(DIM, CHANNELS)

    def forward(self, hidden_states, timestep, viewmats, kv_cache, cache_vision=False):
        img = self.patch(hidden_states.flatten(2).transpose(1, 2))
        vec = self.time(timestep[..., None]).unflatten(-1, (6, DIM))
        for number, block in enumerate(self.double_blocks):
            img, vision_kv = block(
                bi_inference=False, ar_txt_inference=False, ar_vision_inference=True, img=img, vec=vec, freqs_cis=None,
                attn_param=None, block_idx=number, viewmats=viewmats, Ks=None, kv_cache=kv_cache,
                cache_vision=cache_vision,
            )  # fmt: skip
            if cache_vision:
                kv_cache[number].update(vision_kv)
        if cache_vision:
            return kv_cache
        return torch.tanh(self.head(img)).transpose(1, 2).unflatten(2, hidden_states.shape[2:])


def kv(index: Callable[[], Any] = lambda: torch.zeros(1, dtype=torch.long)) -> list[dict[str, Any]]:
    return [
        {
            "k": torch.zeros(1, CAPACITY * TOKENS, DIM),
            "v": torch.zeros(1, CAPACITY * TOKENS, DIM),
            "global_end_index": index(),
            "local_end_index": index(),
        }
        for _ in range(BLOCKS)
    ]


@dataclass(frozen=True)
class Contract:
    """A repository: how its model is made, and how one pass over a chunk of it is called."""

    name: str
    make: Callable[[], nn.Module]
    index: Callable[[], Any] = lambda: torch.zeros(1, dtype=torch.long)
    in_place: bool = True
    chunks: int = 6

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make().eval().requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """What one video holds: K/V per block, and more."""
        if self.name == "HY-WorldPlay":
            return {"kv_cache": [{n: torch.zeros(1, 0, DIM) for n in ("k_vision", "v_vision")} for _ in range(BLOCKS)]}
        held: dict[str, Any] = {
            "kv_cache": kv(self.index),
            "crossattn_cache": [{"is_init": False} for _ in range(BLOCKS)],
        }
        if self.name == "Matrix-Game 2":
            held |= {"kv_cache_mouse": kv(), "kv_cache_keyboard": kv()}
        return held

    def run(
        self, model: nn.Module, latents: Tensor, sigma: float, chunk: int, state: dict[str, Any], clean: bool = False
    ) -> Any:
        """One pass over the latents ``[1, C, F, H, W]`` of a chunk."""
        t = torch.full((1, latents.shape[2]), sigma)
        context = torch.linspace(-1, 1, 2 * DIM).reshape(1, 2, DIM)
        if self.name == "HY-WorldPlay":
            return model(latents, t, context, state["kv_cache"], cache_vision=clean)
        more: dict[str, Any] = {"current_start": chunk * TOKENS}
        if self.name == "CausVid":
            more["current_end"] = more["current_start"] + TOKENS
        if self.name == "Rolling Forcing":
            more["updating_cache"] = clean
        if self.name == "Matrix-Game 2":
            grown = torch.linspace(0, 1, 2 * CHUNK * (chunk + 1)).reshape(1, -1, 2)  # actions of the clip so far
            more |= {"mouse_cond": grown, "keyboard_cond": 1 - grown}
        return model(latents, t, context, **state, **more)


CONTRACTS = [
    Contract("Self-Forcing", lambda: CausalWanModel(SelfForcingBlock)),
    Contract("Krea realtime", lambda: CausalWanModel(SelfForcingBlock), index=int),
    Contract("CausVid", lambda: CausalWanModel(CausVidBlock), chunks=CAPACITY),
    Contract("LongLive", lambda: LongLiveModel(LongLiveBlock)),
    Contract("Rolling Forcing", lambda: CausalWanModel(RollingForcingBlock)),
    Contract("Matrix-Game 2", lambda: CausalWanModel(MatrixGameBlock)),
    Contract("HY-WorldPlay", HunyuanVideo_1_5_DiffusionTransformer, in_place=False),
]

"""The world model: X-World in miniature, a block-causal diffusion transformer over a camera rig.

A *latent frame* holds four video frames of every camera, in colour and in depth, as latents of an autoencoder. A few
latents side by side make a token. A *window* is ``window`` latent frames that are denoised together. They attend to
each other and, through a rolling KV cache, to the windows before them. Blocks alternate between temporal attention (one
camera, both modalities, over the window and the KV cache) and cross-view attention (everything at one instant). Every
token is also shown what the next frames would be if the world stood still
(`holdover_world.conditioning.reprojection`). Noise level and action enter by adaLN-Zero (Peebles & Xie, DiT, arXiv
2212.09748; one shared projection with a learned offset per block, as in PixArt-alpha, arXiv 2310.00426), cameras by the
ray through each token. The model predicts the clean latents (x-prediction, Li & He, arXiv 2511.13720).

Shape suffixes: B batch, F latent frames, N tokens of one latent frame (in the order modality, group, view, h, w),
L = F*N, P values of one token, C channels, V views of a group, H heads, D channels of a head, S tokens of an attention
sequence, A dimensions of the action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from holdover.slot import Slot, ViewGroup
from holdover_world.codec.checkpoints import DIFFERENCE, add_difference, read_network, write_network
from holdover_world.codec.latents import Codec
from holdover_world.conditioning.lookup import Expected
from holdover_world.conditioning.reprojection import Reprojection
from holdover_world.config import WorldConfig
from holdover_world.model.features import RAY_FEATURES, action_features, neighbourhoods, ray_features, sigma_features
from holdover_world.model.history import HistoryBatch, WorldHistory
from holdover_world.model.kv_cache import KVBatch, KVCache
from holdover_world.model.rotary import RotaryTables, Table, TemporalOrder, rotate
from holdover_world.runtime import fast_dtype

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


class WorldModel(ModelMixin, ConfigMixin):
    """Predicts the clean latents of a window from its noisy latents, the noise level, the actions and the history.

    The arguments are those of `WorldConfig`, with cameras as dictionaries; `WorldModel.of` takes a whole `WorldConfig`.
    ``sizes`` is the `WorldConfig`, ``config`` is diffusers' copy of it.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        cameras: Sequence[Mapping[str, Any]],
        channels: int = 256,
        layers: int = 30,
        heads: int = 4,
        mlp_ratio: int = 4,
        latent_channels: int = 48,
        patch: int = 2,
        depth_channels: int = 12,
        depth_patch: int = 4,
        window: int = 4,
        context: int = 4,
        action_dims: int = 2,
    ) -> None:
        super().__init__()
        sizes = WorldConfig.from_dict({k: v for k, v in self.config.items() if not k.startswith("_")})
        c, p = sizes.channels, sizes.patch_values
        self.sizes = sizes
        self._codec: Codec | None = None
        self.embed = nn.ModuleList(nn.Linear(p, c) for _ in sizes.modalities)
        self.last_embed = nn.ModuleList(nn.Linear(9 * p, c, bias=False) for _ in sizes.modalities)
        self.seen_embed = nn.Linear(1, c, bias=False)
        self.layout_embed = nn.ModuleList(nn.Linear(p, c, bias=False) for _ in sizes.modalities)
        self.reprojection = Reprojection(sizes)
        self.ray_mlp = nn.Sequential(nn.Linear(RAY_FEATURES, c), nn.SiLU(), nn.Linear(c, c))
        self.sigma_mlp = nn.Sequential(nn.Linear(128, c), nn.SiLU(), nn.Linear(c, c))
        self.action_mlp = nn.Sequential(nn.Linear(17 * sizes.action_dims, c), nn.SiLU(), nn.Linear(c, c))
        self.no_action_C = nn.Parameter(torch.zeros(c))
        self.modulation = nn.Linear(c, 6 * c)
        self.blocks = nn.ModuleList(Block(sizes, i) for i in range(sizes.layers))
        self.final_norm = nn.LayerNorm(c, elementwise_affine=False, eps=NORM_EPS)
        self.final_modulation = nn.Linear(c, 2 * c)
        self.head = nn.ModuleList(nn.Linear(c, p) for _ in sizes.modalities)
        self.keep, self.keep_layout = nn.Linear(c, 1), nn.Linear(c, 1)
        for layer in (
            self.modulation,
            self.final_modulation,
            *self.head,
            self.keep,
            self.keep_layout,
            self.seen_embed,
            *self.layout_embed,
        ):
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.neighbours_N9: Tensor
        self.rays_NR: Tensor
        self.register_buffer("neighbours_N9", neighbourhoods(sizes), persistent=False)
        self.register_buffer("rays_NR", ray_features(sizes), persistent=False)
        ends = [
            max(plane.tokens.stop for plane in sizes.planes if plane.modality == modality)
            for modality in sizes.modalities
        ]
        self._modality_tokens = [slice(a, b) for a, b in pairwise([0, *ends])]
        self._rotary = RotaryTables(sizes)

    @property
    def codec(self) -> Codec:
        """From video to latents and back.

        Raises:
            ValueError: the model has no autoencoder yet.
        """
        if self._codec is None:
            raise ValueError("this model has no autoencoder; set model.codec, or read both with WorldModel.load")
        return self._codec

    @codec.setter
    def codec(self, codec: Codec) -> None:
        self._codec = codec
        self.reprojection.take(codec)
        self._move_codec()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WorldModel:
        applied: WorldModel = super()._apply(fn, recurse)
        self._move_codec()
        return applied

    def _move_codec(self) -> None:
        """The autoencoders are not parameters of the model, but follow it to its device."""
        for autoencoder in self._codec.autoencoders.values() if self._codec else ():
            nn.Module.to(autoencoder, self.device)

    @classmethod
    def of(cls, sizes: WorldConfig) -> WorldModel:
        """A model of these sizes, with random weights."""
        return cls(**sizes.to_dict())

    def forward(
        self,
        x_BFNP: Tensor,
        *,
        sigma: float | Tensor,
        action_BFA: Tensor | None,
        history: WorldHistory | HistoryBatch | None = None,
        write: bool = False,
        done_BFA: Tensor | None = None,
        shown: Sequence[int] | None = None,
    ) -> Tensor:
        """Predict clean latents.

        Args:
            x_BFNP: noisy latents, `Codec.encode`'s layout.
            sigma: noise level in [0, 1], a number or one per row ``[B]``.
            action_BFA: the normalised action of each latent frame; frames without a command yet hold the newest action.
                None: any action, for the unguided branch of classifier-free guidance.
            history: of the video, or of one video per row. The window attends to its KV cache.
            write: this is the clean pass of a KV update: add these latents, with their keys and values, to the history.
                With a noise level above 0 it is the last denoising pass, which adds the latents that it predicts.
            done_BFA: with ``write``, the actions that the ego carried out meanwhile; by default ``action_BFA``.
            shown: per row the one latent frame that the cache on this model may compute alone. What is expected of the
                others is worked out only if the blocks compute them after all.
        """
        b, f, n, _ = x_BFNP.shape
        dtype = self.keep.weight.dtype
        sigma_B = torch.as_tensor(sigma, dtype=torch.float32, device=x_BFNP.device).expand(b)
        action = self.no_action_C.expand(b, f, -1)
        if action_BFA is not None:
            action = self.action_mlp(action_features(action_BFA.float()).to(dtype))
        condition_BFC = F.silu(self.sigma_mlp(sigma_features(sigma_B).to(dtype))[:, None] + action)
        shared = Pass(
            modulation_BF6C=self.modulation(condition_BFC).unflatten(-1, (6, -1)),
            order=self._rotary.order(x_BFNP.device),
            rotary_temporal=self._rotary.temporal(history.kv.starts if history else (0,), f, x_BFNP.device, dtype),
            rotary_cross=self._rotary.cross(x_BFNP.device, dtype),
            kv=history.kv if history else None,
            write=write,
        )
        embedded_BFNC = self._each(self.embed, x_BFNP.to(dtype)) + self.ray_mlp(self.rays_NR.to(dtype))
        expected: Expected | None = None

        def enter(shown: Sequence[int] | None) -> Tensor:
            """What enters the first block. Still things are looked up: attention learns too slowly where to look."""
            nonlocal expected
            expected = self._expected(history, action_BFA, f, shown) if history is not None else None
            if history is None or expected is None:
                return embedded_BFNC.view(b, f * n, -1)
            return (embedded_BFNC + history.embed(expected, self._embed_expected)).view(b, f * n, -1)

        hidden = enter(shown)
        if shown is not None:
            shared = replace(shared, shown=shown, complete=partial(enter, None))
        for block in self.blocks:
            hidden = block(hidden, shared)
        shift, scale = self.final_modulation(condition_BFC).unsqueeze(2).chunk(2, -1)
        final_BFNC = torch.addcmul(shift, self.final_norm(hidden.view(b, f, n, -1)), 1 + scale)
        clean = self._each(self.head, final_BFNC)
        if expected is not None:
            # Much of a picture is as expected, so it need not pass through the blocks.
            expected_BFNP, _, layout_BFNP = (x.to(dtype) for x in expected)
            clean = torch.addcmul(clean, torch.sigmoid(self.keep(final_BFNC)), expected_BFNP)
            clean = torch.addcmul(clean, self.keep_layout(final_BFNC), layout_BFNP)
        if history is not None and write:
            history.commit(clean.to(x_BFNP.dtype) if (sigma_B > 0).any() else x_BFNP, action_BFA, done_BFA)
        return clean

    def _expected(
        self,
        history: WorldHistory | HistoryBatch,
        action_BFA: Tensor | None,
        frames: int,
        shown: Sequence[int] | None,
    ) -> Expected | None:
        """What is expected of the latent frames; without an action the newest one again, with nothing seen."""
        if history.last is None:
            return None
        if action_BFA is None:
            last_BFNP = history.last[:, None].expand(-1, frames, -1, -1)
            nothing = last_BFNP.new_zeros(1)
            return Expected(last_BFNP, nothing.expand(*last_BFNP.shape[:3], 1), nothing.expand_as(last_BFNP))
        return history.expect(action_BFA, self.reprojection, shown)

    def _embed_expected(self, expected: Expected) -> Tensor:
        """What is expected as it enters the blocks, ``[B, F, N, C]``."""
        expected_BFNP, seen_BFN1, layout_BFNP = (x.to(self.keep.weight.dtype) for x in expected)
        around_BFN9P = F.pad(expected_BFNP, (0, 0, 0, 1))[:, :, self.neighbours_N9]
        embedded = self._each(self.last_embed, around_BFN9P.flatten(3)) + self.seen_embed(seen_BFN1)
        return embedded + self._each(self.layout_embed, layout_BFNP)

    def _each(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        """The tokens ``[..., N, *]`` of each modality through the layer of that modality."""
        parts = zip(layers, self._modality_tokens, strict=True)
        return torch.cat([layer(x[..., tokens, :]) for layer, tokens in parts], -2)

    def new_history(self) -> WorldHistory:
        """The history of a new video."""
        return WorldHistory(kv=KVCache(self.sizes.context))

    def stack(self, histories: Sequence[WorldHistory]) -> HistoryBatch:
        """The histories of several videos as one batch, one row each."""
        return HistoryBatch(histories)

    def holdover_slots(self) -> list[Slot]:
        """The slots for `holdover.attach`: the model, its blocks, and attention and MLP within them."""
        slots = [
            Slot(block, taps={"modulated": Block.modulated}, rows=take_rows, part=compute_part) for block in self.blocks
        ]
        for block in self.blocks:
            if block.temporal:
                slots.append(Slot(block, method="attend_temporal", kind="temporal"))
            else:
                slots.append(Slot(block, method="attend_cross", kind="spatial"))
            slots.append(Slot(block, method="mlp", kind="mlp"))
        return [*slots, Slot("", kind="model", prediction="clean")]

    def holdover_view_groups(self) -> tuple[ViewGroup, ...]:
        return self.sizes.view_groups

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype | None = None) -> WorldModel:
        """Read a model and its codec, in evaluation mode.

        A student in a folder of its teacher's folder may be kept whole, or as its difference from the teacher
        (`write_difference`).

        Args:
            dtype: of the weights; by default the one the CPU is fast in (`fast_dtype`).

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the folder does not hold a world model, or not one of this version.
        """
        different = (folder / DIFFERENCE).is_file()
        base = folder.parent if different else folder
        if not (base / cls.config_name).is_file():
            raise FileNotFoundError(f"no world model in {base}; train one with `holdover world train`")
        model = read_network(cls, base, dtype or fast_dtype())
        if different:
            add_difference(model, folder)
        model.codec = Codec.load(folder, model.sizes, dtype=dtype)
        return model

    def save(self, folder: Path) -> None:
        """Write weights (bfloat16), configuration and codec to a folder. Each file is written whole or not at all."""
        write_network(self, folder)
        if self._codec:
            self._codec.save(folder)

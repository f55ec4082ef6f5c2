"""The reference world model: X-World in miniature, a block-causal diffusion transformer over a camera rig.

A *latent frame* packs ``frames_per_latent`` video frames of every camera into patches of pixels; a *window* is
``window`` latent frames that are denoised together, attending to each other and to the windows before them through a
rolling KV cache. Blocks alternate between temporal attention (one camera over the window and the KV cache) and
cross-view attention (all cameras at one instant); the newest committed latent frame is also shown to every token
directly, as image-to-video models do with their first frame; noise level and action enter by adaLN (Peebles & Xie, DiT,
arXiv 2212.09748; one shared projection with a learned offset per block, as in PixArt-alpha, arXiv 2310.00426). The
model predicts the clean latents (x-prediction, Li & He, arXiv 2511.13720).

Shape suffixes: B batch, F latent frames, N tokens of one latent frame (in the order group, view, h, w), L = F*N,
P values of one patch, C channels, V views of a group, H heads, D channels of a head, S tokens of an attention
sequence, A dimensions of the action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from holdover.engine.slots import Slot, ViewGroup
from holdover.world.config import WorldConfig
from holdover.world.kv_cache import KVBatch, KVCache
from holdover.world.rotary import RotaryTables, Table, rotate

#: Large, so that the norms are nearly linear where activations are small: brightness and contrast then need no outlier
#: channel to carry them past a norm, and X-Cache's deviation test, largest element over mean, needs none to be still.
NORM_EPS = 1.0


@dataclass(frozen=True)
class Pass:
    """What the blocks of one forward pass share.

    ``rotary_temporal`` has a table per view group, ``[S, D]``, or ``[B, S, D]`` where rows stand at different times.
    """

    modulation_BF6C: Tensor
    rotary_temporal: tuple[Table, ...]
    rotary_cross: Table
    cache: KVCache | KVBatch | None
    write: bool

    def rotary(self, group: int, views: int) -> Table:
        """A group's temporal table for queries ``[B*V, H, S, D]``."""
        cos, sin = self.rotary_temporal[group]
        if cos.dim() == 2:
            return cos, sin
        return cos.repeat_interleave(views, 0)[:, None], sin.repeat_interleave(views, 0)[:, None]

    def take(self, rows: Sequence[int]) -> Pass:
        """The same for some rows of the batch."""
        tables = tuple((cos, sin) if cos.dim() == 2 else (cos[rows], sin[rows]) for cos, sin in self.rotary_temporal)
        cache = self.cache.take(rows) if self.cache else None
        return replace(self, modulation_BF6C=self.modulation_BF6C[rows], rotary_temporal=tables, cache=cache)


def take_rows(rows: Sequence[int], hidden_BLC: Tensor, shared: Pass) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments for some rows of the batch."""
    return (hidden_BLC[rows], shared.take(rows)), {}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over ``[*, H, S, D]``; the queries come scaled.

    On a CPU in bfloat16 plain matrix products are about three times as fast as PyTorch's fused kernel. Queries and keys
    are normalised, so the scores are bounded and need no maximum taken from them before they are exponentiated.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, scale=1)
    weights = (q @ k.transpose(-1, -2)).exp_()
    return weights @ v / weights.sum(-1, keepdim=True)


class Block(nn.Module):
    """Attention, over time or across views, and an MLP, both modulated per latent frame."""

    def __init__(self, config: WorldConfig, index: int) -> None:
        super().__init__()
        c = config.channels
        self.config, self.index, self.temporal = config, index, index % 2 == 0
        self.table_6C = nn.Parameter(torch.zeros(6, c))
        self.norm1 = nn.LayerNorm(c, elementwise_affine=False, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(c, elementwise_affine=False, eps=NORM_EPS)
        self.qkv = nn.Linear(c, 3 * c, bias=False)
        head = c // config.heads
        self.norm_q = nn.RMSNorm(head, eps=1e-6)
        self.norm_k = nn.RMSNorm(head, eps=1e-6)
        nn.init.constant_(self.norm_q.weight, head**-0.5)  # the scale of the dot product, learned from there
        self.out = nn.Linear(c, c, bias=False)
        self.up = nn.Linear(c, config.mlp_ratio * c)
        self.down = nn.Linear(config.mlp_ratio * c, c)

    def forward(self, hidden_BLC: Tensor, shared: Pass) -> Tensor:
        x_BFNC = hidden_BLC.unflatten(1, (-1, self.config.tokens))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(shared)
        attend = self.attend_temporal if self.temporal else self.attend_cross
        x_BFNC = torch.addcmul(
            x_BFNC, gate1, self.out(attend(torch.addcmul(shift1, self.norm1(x_BFNC), 1 + scale1), shared))
        )
        mlp = self.mlp(torch.addcmul(shift2, self.norm2(x_BFNC), 1 + scale2))
        return torch.addcmul(x_BFNC, gate2, mlp).view(hidden_BLC.shape)

    def modulation(self, shared: Pass) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention and of the MLP, each ``[B, F, 1, C]``."""
        return (shared.modulation_BF6C + self.table_6C).unsqueeze(2).unbind(3)

    def modulated(self, hidden_BLC: Tensor, shared: Pass) -> Tensor:
        """What the attention sees, ``[B, L, C]``: the tap of methods such as TeaCache."""
        shift, scale, *_ = self.modulation(shared)
        x_BFNC = hidden_BLC.unflatten(1, (-1, self.config.tokens))
        return torch.addcmul(shift, self.norm1(x_BFNC), 1 + scale).flatten(1, 2)

    def mlp(self, x: Tensor) -> Tensor:
        """Each token ``[..., C]`` for itself."""
        result: Tensor = self.down(F.gelu(self.up(x)))
        return result

    def attend_temporal(self, x_BFNC: Tensor, shared: Pass) -> Tensor:
        """Each camera for itself, over the window and the windows held in the KV cache."""
        b, f, _, c = x_BFNC.shape
        qkv, outputs, start = self.qkv(x_BFNC), [], 0
        for g, group in enumerate(self.config.view_groups):
            size = group.height * group.width
            stop = start + group.views * size
            part = qkv[:, :, start:stop].reshape(b, f, group.views, size, 3, self.config.heads, -1)
            q, k, v = part.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, b * group.views, self.config.heads, f * size, -1)
            table = shared.rotary(g, group.views)
            q, k = rotate(self.norm_q(q), table), rotate(self.norm_k(k), table)
            held = shared.cache.get(self.index, g) if shared.cache else None
            if shared.cache and shared.write:
                shared.cache.stage(self.index, g, k, v)
            if held:
                k, v = torch.cat([held[0], k], 2), torch.cat([held[1], v], 2)
            out = attention(q, k, v).view(b, group.views, self.config.heads, f, size, -1)
            outputs.append(out.permute(0, 3, 1, 4, 2, 5).reshape(b, f, stop - start, c))
            start = stop
        return torch.cat(outputs, 2)

    def attend_cross(self, x_BFNC: Tensor, shared: Pass) -> Tensor:
        """All cameras at one instant; positions are viewing directions, so that overlapping cameras meet."""
        b, f, n, c = x_BFNC.shape
        q, k, v = self.qkv(x_BFNC).view(b, f, n, 3, self.config.heads, -1).permute(3, 0, 1, 4, 2, 5)
        q, k = rotate(self.norm_q(q), shared.rotary_cross), rotate(self.norm_k(k), shared.rotary_cross)
        return attention(q, k, v).transpose(2, 3).reshape(b, f, n, c)


class WorldModel(nn.Module):
    """Predicts the clean latents of a window from its noisy ones, the noise level, the actions and the KV cache."""

    def __init__(self, config: WorldConfig) -> None:
        super().__init__()
        c = config.channels
        self.config = config
        self.embed = nn.Linear(config.patch_values, c)
        self.last_embed = nn.Linear(9 * config.patch_values, c, bias=False)
        self.position_NC = nn.Parameter(torch.randn(config.tokens, c) * 0.02)
        self.sigma_mlp = nn.Sequential(nn.Linear(128, c), nn.SiLU(), nn.Linear(c, c))
        self.action_mlp = nn.Sequential(nn.Linear(17 * config.action_dims, c), nn.SiLU(), nn.Linear(c, c))
        self.modulation = nn.Linear(c, 6 * c)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.final_norm = nn.LayerNorm(c, elementwise_affine=False, eps=NORM_EPS)
        self.final_modulation = nn.Linear(c, 2 * c)
        self.head = nn.Linear(c, config.patch_values)
        self.keep = nn.Linear(c, config.frames_per_latent)
        self.motion = nn.Linear(c, 6 * config.frames_per_latent)
        for layer in (self.modulation, self.final_modulation, self.head, self.keep, self.motion):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.neighbours_N9: Tensor
        self.register_buffer("neighbours_N9", neighbourhoods(config), persistent=False)
        self._rotary = RotaryTables(config)

    def forward(
        self,
        x_BFNP: Tensor,
        *,
        sigma: float | Tensor,
        action_BFA: Tensor,
        cache: KVCache | KVBatch | None = None,
        write: bool = False,
    ) -> Tensor:
        """Predict clean latents.

        Args:
            x_BFNP: noisy latents, `patchify`'s layout.
            sigma: noise level in [0, 1], a number or one per row ``[B]``.
            action_BFA: the normalised action of each latent frame; frames not yet commanded hold the newest.
            cache: the KV cache of the stream, or those of a stream per row; its windows are attended to.
            write: commit this pass's keys and values to the cache (the clean pass of the KV update).
        """
        b, f, n, _ = x_BFNP.shape
        dtype = self.head.weight.dtype
        sigma_B = torch.as_tensor(sigma, dtype=torch.float32, device=x_BFNP.device).expand(b)
        condition_BFC = self.sigma_mlp(sigma_features(sigma_B).to(dtype))[:, None] + self.action_mlp(
            action_features(action_BFA.float()).to(dtype)
        )
        condition_BFC = F.silu(condition_BFC)
        shared = Pass(
            modulation_BF6C=self.modulation(condition_BFC).unflatten(-1, (6, -1)),
            rotary_temporal=self._rotary.temporal(cache.starts if cache else (0,), f, x_BFNP.device, dtype),
            rotary_cross=self._rotary.cross(x_BFNP.device, dtype),
            cache=cache,
            write=write,
        )
        hidden_BFNC = self.embed(x_BFNP.to(dtype)) + self.position_NC
        last_BNP = cache.last.to(dtype) if cache is not None and cache.last is not None else None
        if last_BNP is not None:
            # What was there a moment ago, and around it: attention alone takes long to learn to look there.
            around_BN9P = F.pad(last_BNP, (0, 0, 0, 1))[:, self.neighbours_N9]
            hidden_BFNC = hidden_BFNC + self.last_embed(around_BN9P.flatten(2))[:, None]
        hidden = hidden_BFNC.view(b, f * n, -1)
        for block in self.blocks:
            hidden = block(hidden, shared)
        if cache is not None and write:
            cache.commit(x_BFNP)
        shift, scale = self.final_modulation(condition_BFC).unsqueeze(2).chunk(2, -1)
        final_BFNC = self.final_norm(hidden.view(b, f, n, -1)) * (1 + scale) + shift
        clean: Tensor = self.head(final_BFNC)
        if last_BNP is not None:
            clean = clean + self.carried(last_BNP, self.motion(final_BFNC), torch.sigmoid(self.keep(final_BFNC)))
        return clean

    def carried(self, last_BNP: Tensor, motion_BFNM: Tensor, share_BFNT: Tensor) -> Tensor:
        """What the newest video frame contributes to each prediction, ``[B, F, N, P]``.

        Every patch of every predicted video frame looks where in the newest one its content was, by an affine motion of
        its own (Finn et al., arXiv 1605.07157, predict motion rather than pixels, too). It takes over the mean colour
        it finds, so that the blocks need not carry brightness through the residual stream, and a share of the detail.

        Args:
            last_BNP: the newest latent frame.
            motion_BFNM: per token and video frame T of a latent one, six numbers: offset down and right, and how both
                change from the patch's centre to its lower and right edge, in half patches.
            share_BFNT: of the detail that is taken over.
        """
        config, half = self.config, self.config.patch / 2
        b, f, _, _ = motion_BFNM.shape
        inside = (torch.arange(config.patch, device=last_BNP.device) + 0.5) / half - 1
        down_X, right_X = (t.flatten() for t in torch.meshgrid(inside, inside, indexing="ij"))
        basis_3X = torch.stack([torch.ones_like(down_X), down_X, right_X])
        motion_BFNT2X = motion_BFNM.float().unflatten(-1, (config.frames_per_latent, 2, 3)) @ basis_3X
        newest_BNX3 = last_BNP.float().unflatten(-1, (config.frames_per_latent, -1, 3))[:, :, -1]
        found, start = [], 0
        for camera in (camera for group in config.groups for camera in group):
            rows, columns = config.grid(camera)
            part = slice(start, start + rows * columns)
            start = part.stop
            image = newest_BNX3[:, part].unflatten(2, (config.patch, -1)).unflatten(1, (rows, columns))
            image_B3HW = image.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, camera.height, camera.width)
            # From half patches about a patch's centre to grid_sample's -1..1 over the whole image.
            row, column = torch.meshgrid(
                torch.arange(rows, device=image.device), torch.arange(columns, device=image.device), indexing="ij"
            )
            moved = motion_BFNT2X[:, :, part]
            y = (2 * row.flatten()[:, None, None] + 1 + moved[..., 0, :] + down_X) / rows - 1
            x = (2 * column.flatten()[:, None, None] + 1 + moved[..., 1, :] + right_X) / columns - 1
            grid = torch.stack([x, y], -1).flatten(1, 3)
            sampled = F.grid_sample(image_B3HW, grid, padding_mode="border", align_corners=False)
            found.append(sampled.permute(0, 2, 3, 1).unflatten(1, (f, rows * columns, config.frames_per_latent)))
        found_BFNTX3 = torch.cat(found, 2)
        colour_BFNT13 = found_BFNTX3.mean(4, keepdim=True)
        taken = torch.lerp(colour_BFNT13, found_BFNTX3, share_BFNT[..., None, None].float())
        return taken.flatten(3).to(share_BFNT.dtype)

    def new_cache(self) -> KVCache:
        return KVCache(self.config.context)

    def holdover_slots(self) -> list[Slot]:
        """Where `holdover.attach` finds the blocks, and attention and MLP within them."""
        slots = [Slot(block, taps={"modulated": Block.modulated}, rows=take_rows) for block in self.blocks]
        for block in self.blocks:
            if block.temporal:
                slots.append(Slot(block, method="attend_temporal", kind="temporal"))
            else:
                slots.append(Slot(block, method="attend_cross", kind="spatial"))
            slots.append(Slot(block, method="mlp", kind="mlp"))
        return slots

    def holdover_view_groups(self) -> tuple[ViewGroup, ...]:
        return self.config.view_groups

    def save(self, path: Path) -> None:
        """Write weights (bfloat16) and configuration to one safetensors file, whole or not at all."""
        tensors = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in self.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        save_file(tensors, temporary, metadata={"config": self.config.to_json()})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, *, dtype: torch.dtype = torch.bfloat16) -> WorldModel:
        """Read a model that `save` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a world model, or not one of this version.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}; train one with `holdover world train`")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "config" not in metadata:
                raise ValueError(f"{path} carries no world model configuration; write checkpoints with WorldModel.save")
            model = cls(WorldConfig.from_json(metadata["config"]))
            try:
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            except RuntimeError as error:  # tensors that are missing, left over or of other sizes
                raise ValueError(f"{path} is not a world model of this version; train it again") from error
        return model.to(dtype).eval().requires_grad_(False)


def neighbourhoods(config: WorldConfig) -> Tensor:
    """Of each token, the nine tokens around it in its camera, ``[N, 9]``; N itself stands for none."""
    index, start = [], 0
    for camera in (camera for group in config.groups for camera in group):
        rows, columns = config.grid(camera)
        grid = torch.arange(start, start + rows * columns).view(rows, columns)
        padded = F.pad(grid, (1, 1, 1, 1), value=config.tokens)
        index.append(padded.unfold(0, 3, 1).unfold(1, 3, 1).reshape(-1, 9))
        start += rows * columns
    return torch.cat(index)


def sigma_features(sigma_B: Tensor) -> Tensor:
    """Sinusoidal features ``[B, 128]`` of a noise level in [0, 1]."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), 64, device=sigma_B.device))
    angles = sigma_B[:, None] * frequencies * math.pi
    return torch.cat([angles.cos(), angles.sin()], 1)


def action_features(action_BFA: Tensor) -> Tensor:
    """The action itself and its Fourier features at eight octaves, ``[B, F, 17*A]``."""
    octaves = math.pi * 2.0 ** torch.arange(-1, 7, device=action_BFA.device)
    angles = (action_BFA[..., None] * octaves).flatten(-2)
    return torch.cat([action_BFA, angles.sin(), angles.cos()], -1)

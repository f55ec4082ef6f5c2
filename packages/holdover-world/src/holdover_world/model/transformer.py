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
from dataclasses import replace
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
from holdover_world.model.block import NORM_EPS, Block, Pass, compute_part, take_rows
from holdover_world.model.features import RAY_FEATURES, action_features, neighbourhoods, ray_features, sigma_features
from holdover_world.model.history import HistoryBatch, WorldHistory
from holdover_world.model.kv_cache import KVCache
from holdover_world.model.rotary import RotaryTables
from holdover_world.runtime import fast_dtype


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

"""The real classes of diffusers, tiny and with random weights, and something for each to denoise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.holdover.models import inputs
from tests.holdover.models.inputs import FRAMES, TEXT, WAN, WIDE

HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
LTX2 = {
    **WIDE,
    "cross_attention_dim": 24,
    "caption_channels": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 12,
    "audio_cross_attention_dim": 24,
}
HELIOS = {key: value for key, value in WAN.items() if key != "rope_max_seq_len"} | {
    "rope_dim": (4, 4, 4),
    "has_multi_term_memory_patch": False,
}


@dataclass(frozen=True)
class Tiny:
    """A class, its configuration, and the arguments of its forward at a step for latents of a number of frames."""

    name: str
    config: dict[str, Any]
    inputs: Callable[..., dict[str, Any]]
    batches: bool = True

    def make(self) -> nn.Module:
        import diffusers

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(diffusers, self.name)(**self.config)
            for parameter in model.parameters():  # gates begin at zero in some, and would hide what blocks do
                nn.init.normal_(parameter, std=0.15)
        return model.eval().requires_grad_(False)

    def run(self, model: nn.Module, step: int, *, frames: int = FRAMES, batch: int = 1, seed: int = 0) -> Tensor:
        output = model(**self.inputs(step, frames, batch, seed), return_dict=False)
        first: Tensor = output[0]
        return first[0] if isinstance(first, list) else first


TINY = [
    Tiny("WanTransformer3DModel", WAN, inputs.wan),
    Tiny("WanVACETransformer3DModel", {**WAN, "vace_layers": [0, 1], "vace_in_channels": 6}, inputs.vace),
    Tiny(
        "WanAnimateTransformer3DModel",
        {
            **WAN,
            "in_channels": 12,
            "num_layers": 4,
            "latent_channels": 4,
            "image_dim": 8,
            "added_kv_proj_dim": 24,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        inputs.animate,
    ),
    Tiny("ChronoEditTransformer3DModel", WAN, inputs.wan),
    Tiny("SkyReelsV2Transformer3DModel", WAN, inputs.wan),
    Tiny("HeliosTransformer3DModel", HELIOS, inputs.wan),
    Tiny("AnyFlowTransformer3DModel", WAN, inputs.anyflow),
    Tiny("AnyFlowFARTransformer3DModel", {**WAN, "chunk_partition": (3,)}, inputs.chunk),
    Tiny(
        "CosmosTransformer3DModel",
        {
            **WIDE,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (8, 16, 16),
            "extra_pos_embed_type": None,
            "concat_padding_mask": False,
        },
        inputs.cosmos,
    ),
    Tiny(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 12,
            "hidden_size": 24,
            "intermediate_size": 32,
            "latent_channel": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "patch_latent_dim": 16,
            "vocab_size": 16,
            "rope_axes_dim": (2, 2, 2),
        },
        inputs.cosmos3,
        batches=False,
    ),
    Tiny("HunyuanVideoTransformer3DModel", HUNYUAN, inputs.hunyuan),
    Tiny(
        "HunyuanVideo15Transformer3DModel",
        {key: value for key, value in HUNYUAN.items() if key not in ("num_single_layers", "pooled_projection_dim")}
        | {"text_embed_2_dim": 8, "image_embed_dim": 12, "target_size": 16},
        inputs.hunyuan15,
    ),
    Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN, "patch_size": 2, "has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True},
        inputs.framepack,
    ),
    Tiny("LTXVideoTransformer3DModel", {**WIDE, "cross_attention_dim": 24, "caption_channels": 16}, inputs.ltx),
    Tiny("LTX2VideoTransformer3DModel", LTX2, inputs.ltx2),
    Tiny(
        "CogVideoXTransformer3DModel",
        {
            **WIDE,
            "attention_head_dim": 16,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": TEXT,
        },
        inputs.cogvideox,
    ),
    Tiny(
        "MochiTransformer3DModel",
        {**WIDE, "pooled_projection_dim": 8, "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": TEXT},
        inputs.masked,
    ),
    Tiny(
        "AllegroTransformer3DModel",
        {
            **WIDE,
            "attention_head_dim": 24,
            "cross_attention_dim": 48,
            "caption_channels": 16,
            "sample_height": 8,
            "sample_width": 12,
            "sample_frames": 3,
        },
        inputs.allegro,
    ),
    Tiny(
        "SanaVideoTransformer3DModel",
        {
            **WIDE,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
        },
        inputs.masked,
    ),
    Tiny(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 4,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "linear_head_dim": 12,
            "caption_channels": 16,
            "chunk_plucker_post_attn_blocks": 2,
        },
        inputs.sana_wm,
    ),
    Tiny("SanaWMLTX2RefinerTransformer3DModel", LTX2, inputs.refiner),
]

"""The real classes of diffusers, tiny and with random weights, and something for each to denoise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROWS, COLUMNS, FRAMES, TEXT = 4, 6, 3, 5
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 24,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
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
HELIOS = {key: value for key, value in WAN.items() if key != "rope_max_seq_len"} | {
    "rope_dim": (4, 4, 4),
    "has_multi_term_memory_patch": False,
}


def noise(step: int, *shape: int, seed: int = 0) -> Tensor:
    """Denoises slowly: neighbouring steps are alike."""
    start, drift = (torch.randn(shape, generator=torch.Generator().manual_seed(seed + n)) for n in (0, 1))
    return start + 0.1 * step * drift


def fixed(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


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


def latents(step: int, frames: int, batch: int, seed: int, channels: int = 4, scale: int = 2) -> Tensor:
    return torch.cat(
        [noise(step, 1, channels, frames, scale * ROWS, scale * COLUMNS, seed=seed + 7 * b) for b in range(batch)]
    )


def text(batch: int, width: int = 16) -> Tensor:
    return fixed(1, TEXT, width).expand(batch, -1, -1).contiguous()


def time(step: int, batch: int) -> Tensor:
    return torch.full((batch,), 900.0 - 50 * step)


def wan(step: int, frames: int, batch: int, seed: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": latents(step, frames, batch, seed),
        "timestep": time(step, batch),
        "encoder_hidden_states": text(batch),
        **more,
    }


def vace(step: int, frames: int, batch: int, seed: int) -> dict[str, Any]:
    control = latents(0, frames, 1, 3, channels=6).expand(batch, -1, -1, -1, -1)
    return wan(step, frames, batch, seed, control_hidden_states=control)


def anyflow(step: int, frames: int, batch: int, seed: int) -> dict[str, Any]:
    given = wan(step, frames, batch, seed)
    moment = time(step, batch)[:, None].expand(-1, frames)
    given["hidden_states"] = given["hidden_states"].permute(0, 2, 1, 3, 4)
    return {**given, "timestep": moment, "r_timestep": moment - 50}


def chunk(step: int, frames: int, batch: int, seed: int, write: bool = False, kv: Any = None) -> dict[str, Any]:
    """AnyFlow FAR: the first chunk, before a KV cache that has room for it."""
    tokens, head = frames * ROWS * COLUMNS, WAN["attention_head_dim"]
    if kv is None:
        kv = far_kv(batch, tokens, head)
    return {
        **anyflow(step, frames, batch, seed),
        "chunk_partition": [frames],
        "kv_cache": kv,
        "kv_cache_flag": {"num_cached_chunks": 0, "is_cache_step": write},
    }


def far_kv(batch: int, tokens: int, head: int) -> dict[int, dict[str, Tensor]]:
    shape = 2, batch, WAN["num_attention_heads"], tokens, head
    names = ("full_cache", "compressed_cache")
    return {layer: {name: torch.zeros(shape) for name in names} for layer in range(WAN["num_layers"])}


def cosmos(step: int, frames: int, batch: int, seed: int) -> dict[str, Any]:
    return wan(step, frames, batch, seed, fps=16)


def hunyuan(step: int, frames: int, batch: int, seed: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": latents(step, frames, batch, seed, scale=1),
        "timestep": time(step, batch).long(),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": torch.ones(batch, TEXT),
        "pooled_projections": fixed(1, 8).expand(batch, -1),
        "guidance": torch.full((batch,), 6000.0),
        **more,
    }


def hunyuan15(step: int, frames: int, batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(step, frames, batch, seed, scale=1),
        "timestep": time(step, batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": torch.ones(batch, TEXT),
        "encoder_hidden_states_2": text(batch, 8),
        "encoder_attention_mask_2": torch.ones(batch, TEXT),
        "image_embeds": fixed(1, 2, 12).expand(batch, -1, -1),
    }


def ltx(step: int, frames: int, batch: int, seed: int, **more: Any) -> dict[str, Any]:
    packed = latents(step, frames, batch, seed, scale=1).flatten(2).transpose(1, 2)
    return {
        "hidden_states": packed,
        "encoder_hidden_states": text(batch),
        "timestep": time(step, batch),
        "encoder_attention_mask": torch.ones(batch, TEXT).bool(),
        "num_frames": frames,
        "height": ROWS,
        "width": COLUMNS,
        **more,
    }


def ltx2(step: int, frames: int, batch: int, seed: int) -> dict[str, Any]:
    sound = noise(step, batch, 4, 4, seed=seed + 3)
    more = {
        "audio_hidden_states": sound,
        "audio_encoder_hidden_states": text(batch),
        "audio_num_frames": 4,
        "fps": 24.0,
    }
    return ltx(step, frames, batch, seed, **more, audio_encoder_attention_mask=torch.ones(batch, TEXT).bool())


def cogvideox(step: int, frames: int, batch: int, seed: int) -> dict[str, Any]:
    given = wan(step, frames, batch, seed)
    given["hidden_states"] = given["hidden_states"].permute(0, 2, 1, 3, 4)
    return given


def masked(step: int, frames: int, batch: int, seed: int) -> dict[str, Any]:
    return wan(step, frames, batch, seed, encoder_attention_mask=torch.ones(batch, TEXT))


def sana_wm(step: int, frames: int, batch: int, seed: int) -> dict[str, Any]:
    given = wan(step, frames, batch, seed, encoder_attention_mask=torch.ones(batch, TEXT))
    given["hidden_states"] = latents(step, frames, batch, seed, scale=1)
    given["timestep"] = time(step, batch)[:, None, None].expand(-1, 1, frames)
    return {**given, "encoder_hidden_states": text(batch)[:, None]}


def cosmos3(step: int, frames: int, batch: int, seed: int) -> dict[str, Any]:
    tokens = frames * ROWS * COLUMNS
    length = TEXT + tokens
    vision = noise(step, 1, 4, frames, 2 * ROWS, 2 * COLUMNS, seed=seed)
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(length).expand(3, -1),
        "und_len": TEXT,
        "sequence_length": length,
        "vision_tokens": [vision],
        "vision_token_shapes": [(frames, ROWS, COLUMNS)],
        "vision_sequence_indexes": torch.arange(TEXT, length),
        "vision_mse_loss_indexes": torch.arange(TEXT, length),
        "vision_timesteps": torch.full((tokens,), 900.0 - 50 * step),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
    }


def allegro(step: int, frames: int, batch: int, seed: int) -> dict[str, Any]:
    given = masked(step, frames, batch, seed)
    ones = torch.ones(batch, frames, 2 * ROWS, 2 * COLUMNS)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(ROWS), torch.arange(COLUMNS)).T
    angles = [torch.outer(torch.arange(8.0), torch.ones(8)) for axis in grid]
    rotary = [(angle.cos(), angle.sin()) for angle in angles], [axis[None] for axis in grid]
    return {**given, "attention_mask": ones, "image_rotary_emb": rotary}


WIDE = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}

TINY = [
    Tiny("WanTransformer3DModel", WAN, wan),
    Tiny("WanVACETransformer3DModel", {**WAN, "vace_layers": [0, 1], "vace_in_channels": 6}, vace),
    Tiny("ChronoEditTransformer3DModel", WAN, wan),
    Tiny("SkyReelsV2Transformer3DModel", WAN, wan),
    Tiny("HeliosTransformer3DModel", HELIOS, wan),
    Tiny("AnyFlowTransformer3DModel", WAN, anyflow),
    Tiny("AnyFlowFARTransformer3DModel", {**WAN, "chunk_partition": (3,)}, chunk),
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
        cosmos,
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
        cosmos3,
        batches=False,
    ),
    Tiny("HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan),
    Tiny(
        "HunyuanVideo15Transformer3DModel",
        {key: value for key, value in HUNYUAN.items() if key not in ("num_single_layers", "pooled_projection_dim")}
        | {"text_embed_2_dim": 8, "image_embed_dim": 12, "target_size": 16},
        hunyuan15,
    ),
    Tiny("LTXVideoTransformer3DModel", {**WIDE, "cross_attention_dim": 24, "caption_channels": 16}, ltx),
    Tiny(
        "LTX2VideoTransformer3DModel",
        {
            **WIDE,
            "cross_attention_dim": 24,
            "caption_channels": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 12,
            "audio_cross_attention_dim": 24,
        },
        ltx2,
    ),
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
        cogvideox,
    ),
    Tiny(
        "MochiTransformer3DModel",
        {**WIDE, "pooled_projection_dim": 8, "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": TEXT},
        masked,
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
        allegro,
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
        masked,
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
        sana_wm,
    ),
]

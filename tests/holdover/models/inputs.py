"""Arguments of one forward of each class of diffusers, at a step, for latents of a number of frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
WIDE = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}


def noise(step: int, *shape: int, seed: int = 0) -> Tensor:
    """Denoises slowly: neighbouring steps are alike."""
    start, drift = (torch.randn(shape, generator=torch.Generator().manual_seed(seed + n)) for n in (0, 1))
    return start + 0.1 * step * drift


def fixed(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


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


def animate(step: int, frames: int, batch: int, seed: int) -> dict[str, Any]:
    """The first latent frame is the character; pose and face move the others."""
    pose = latents(0, frames - 1, 1, 3).expand(batch, -1, -1, -1, -1)
    face = fixed(1, 3, 4 * (frames - 2) + 1, 16, 16).expand(batch, -1, -1, -1, -1)
    given = wan(step, frames, batch, seed, pose_hidden_states=pose, face_pixel_values=face)
    given["hidden_states"] = latents(step, frames, batch, seed, channels=12)
    return {**given, "encoder_hidden_states_image": fixed(1, 2, 8).expand(batch, -1, -1)}


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


def framepack(step: int, frames: int, batch: int, seed: int) -> dict[str, Any]:
    """Before the noisy frames lies a history of seven: four small ones, two larger ones, a whole one."""
    given = hunyuan(step, frames, batch, seed, image_embeds=fixed(1, 2, 12).expand(batch, -1, -1))
    for name, first, count in (("history_4x", 0, 4), ("history_2x", 4, 2), ("clean", 6, 1)):
        given[f"latents_{name}"] = latents(0, count, batch, 5)
        given[f"indices_latents_{name}"] = torch.arange(first, first + count)
    new = torch.arange(7, 7 + frames)
    return {**given, "hidden_states": latents(step, frames, batch, seed), "indices_latents": new}


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


def refiner(step: int, frames: int, batch: int, seed: int, write: bool = False, kv: Any = None) -> dict[str, Any]:
    """SANA-WM's refiner: a chunk of frames after one whose K/V are known."""
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    if kv is None:
        kv = SanaWMRefinerKVCache(WIDE["num_layers"])
        for layer in kv.layer_caches:
            layer.store_history(fixed(batch, ROWS * COLUMNS, 24), fixed(batch, ROWS * COLUMNS, 24) - 1)
    given = ltx(step, frames, batch, seed)
    places = [torch.outer(torch.arange(float(frames * ROWS * COLUMNS)), torch.ones(24))[None].expand(batch, -1, -1)]
    return {
        **{name: given[name] for name in ("hidden_states", "encoder_hidden_states", "encoder_attention_mask")},
        "timestep": time(step, batch)[:, None].expand(-1, given["hidden_states"].shape[1]),
        "video_rotary_emb": (places[0].cos(), places[0].sin()),
        "kv_cache": kv,
        "kv_cache_mode": "inject_and_capture_post_rope" if write else "inject",
    }


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

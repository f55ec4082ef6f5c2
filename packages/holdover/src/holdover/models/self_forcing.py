"""The Self-Forcing family: chunk-causal Wan, as its repositories run it. Most call their model `CausalWanModel`.

Noisy passes write keys and values in place, at the position of the current chunk. A reused block leaves that position
as it was. The clean pass is always computed, and overwrites it before any later chunk reads it. This works for blocks
that find their position by their own cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdover.models.adapter import Adapter, Place, any_model
from holdover.models.diffusers import patches
from holdover.models.noise import of_t


def takes(argument: str) -> Callable[[Any], bool]:
    """Whether the blocks of a model take an argument of that name."""

    def tells(model: Any) -> bool:
        return any(argument in inspect.signature(block.forward).parameters for block in model.blocks)

    return tells


def grid(model: Any, x: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """Latents ``[B, C, F, H, W]``, or a list of them without the batch."""
    return x[0].shape[-2] // model.patch_size[1], x[0].shape[-1] // model.patch_size[2]


def modulated(block: Any, x: Tensor, e: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``e`` is ``[B, F, 6, C]``: one modulation per latent frame."""
    shift, scale = (block.modulation.unsqueeze(1) + e).unbind(2)[:2]
    normed = block.norm1(x).unflatten(1, (e.shape[1], -1))
    output: Tensor = (normed * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)
    return output


def no_update(block: nn.Module, *args: Any, kv_cache: Mapping[str, Any], **kwargs: Any) -> tuple[Any, ...]:
    """LongLive applies what its blocks return to the KV cache once all have run. This leaves the cache as it is."""
    return ((int(kv_cache["global_end_index"]), int(kv_cache["local_end_index"]), None),)


def updating(block: nn.Module, *args: Any, updating_cache: bool = False, **kwargs: Any) -> bool:
    return updating_cache


def masked(module: nn.Module, *args: Any, block_mask: Any = None, kv_cache: Any = None, **kwargs: Any) -> bool:
    """Krea and LongLive write keys and values of the whole context again, in a pass over clean frames with a mask."""
    return block_mask is not None and kv_cache is not None


def masked_by_model(model: Any, *args: Any, kv_cache: Any = None, **kwargs: Any) -> bool:
    """Krea hands the mask over as an attribute, which it takes back after the pass."""
    return model.block_mask is not None and kv_cache is not None


def switches(module: nn.Module, *args: Any, sink_recache_after_switch: bool = False, **kwargs: Any) -> bool:
    """LongLive's branch v1.0 does not take its mask back, so that alone tells nothing; another argument does."""
    return sink_recache_after_switch


def wide_sink(model: Any) -> str:
    """Whether a pass may write into the sink follows from an end that noisy passes move (LongLive, branch v1.0)."""
    sink, chunk = model.blocks[0].self_attn.sink_size, model.num_frame_per_block
    if sink <= chunk:
        return ""
    return (
        f"its sink of {sink} latent frames is larger than a chunk of {chunk}, and what the clean pass writes there "
        f"depends on noisy passes before it"
    )


def caches(
    module: nn.Module, *args: Any, cache_vision: bool = False, ar_txt_inference: bool = False, **kwargs: Any
) -> bool:
    """HY-WorldPlay's passes over the text and over clean context."""
    return cache_vision or ar_txt_inference


def block_caches(block: nn.Module, *args: Any, is_cache: bool = False, **kwargs: Any) -> bool:
    """The same, of HY-WorldPlay's Wan: its blocks are told by position."""
    return bool(args[5]) if len(args) > 5 else is_cache


def model_caches(model: nn.Module, *args: Any, is_cache: bool = False, **kwargs: Any) -> bool:
    return is_cache


def nothing_beside(block: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """HY-WorldPlay's Wan leaves aside what a noisy pass returns beside the hidden state."""
    return ({},)


def modulated_by_frame(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """``temb [B·F, 6, C]``: one modulation per latent frame."""
    b = hidden_states.shape[0]
    shift, scale = (block.scale_shift_table + temb.float()).unflatten(0, (b, -1)).unbind(2)[:2]
    normed = block.norm1(hidden_states.float()).unflatten(1, (shift.shape[1], -1))
    output: Tensor = (normed * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)
    return output


def place(
    model: nn.Module,
    x: Any,
    t: Tensor,
    *args: Any,
    kv_cache: Any = None,
    current_start: Any = 0,
    **kwargs: Any,
) -> Place | None:
    """``t`` has a timestep per latent frame, 0 to 1000, or a row of them per video."""
    if kv_cache is None:
        return None
    least, most = torch.stack(torch.aminmax(t.float())).tolist()
    return Place(kv_cache, int(current_start), most, least < most)


def _causal_wan(family: str, **more: Any) -> Adapter:
    fields: dict[str, Any] = {
        "grid": grid,
        "tells": any_model,
        "taps": {"modulated": modulated},
        "condition": ("context", "clip_fea", "y"),
        "place": place,
        "prediction": "flow",
        "noise": of_t,
        "writes_kv": True,
    }
    return Adapter(
        model="CausalWanModel",
        family=family,
        blocks=("blocks",),
        hidden="x",
        autoregressive=True,
        tested="contract",
        **{**fields, **more},
    )


#: These tell a pass that writes the whole context anew, and not the clean pass that ends a chunk.
RECOMPUTING = (masked, switches)

#: The plain one comes last: the others are told apart by what their blocks take.
SELF_FORCING = (
    _causal_wan("Matrix-Game 2", tells=takes("kv_cache_keyboard"), condition=("visual_context", "cond_concat")),
    _causal_wan(
        "Rolling Forcing",
        tells=takes("updating_cache"),
        block_kv_update=updating,
        kv_update=updating,
        refused="a pass is over several chunks at staggered noise, and the next one over a window one chunk on, so "
        "what is held over would stand one chunk out of place",
    ),
    _causal_wan(
        "StreamDiffusionV2",
        tells=takes("causal_rope_cache"),
        place=None,
        refused="it has no clean pass, so that what noisy passes write stays in its KV cache, and the place of a write "
        "follows from how many calls each layer has counted",
    ),
    _causal_wan(
        "LongLive 2",
        tells=takes("use_relative_rope"),
        refused="every block goes by the first one's place in the KV cache, and one held over falls behind it",
    ),
    _causal_wan(
        "LongLive, branch v1.0",
        tells=takes("sink_recache_after_switch"),
        beside=no_update,
        block_kv_update=switches,
        kv_update=switches,
        refuses=wide_sink,
    ),
    _causal_wan(
        "LongLive",
        tells=lambda model: hasattr(model, "_apply_cache_updates"),
        beside=no_update,
        block_kv_update=masked,
        kv_update=masked,
    ),
    _causal_wan("CausVid", tells=takes("current_end")),
    _causal_wan(
        "Krea realtime",
        tells=lambda model: any(hasattr(module, "fuse_projections") for module in model.modules()),
        block_kv_update=masked,
        kv_update=masked_by_model,
    ),
    _causal_wan("Self-Forcing, Causal-Forcing"),
    Adapter(
        model="HunyuanVideo_1_5_DiffusionTransformer",
        family="HY-WorldPlay",
        blocks=("double_blocks",),
        hidden="img",
        block_kv_update=caches,
        kv_update=caches,
        autoregressive=True,
        action="action",
        latents="hidden_states",
        condition=("viewmats", "Ks"),
        tested="contract",
    ),
    Adapter(
        model="WanTransformer3DModel",
        family="HY-WorldPlay, Wan",
        tells=lambda model: "is_cache" in inspect.signature(model.forward).parameters,
        blocks=("blocks",),
        beside=nothing_beside,
        taps={"modulated": modulated_by_frame},
        grid=patches,
        block_kv_update=block_caches,
        kv_update=model_caches,
        autoregressive=True,
        action="action",
        condition=("encoder_hidden_states", "encoder_hidden_states_image", "viewmats", "Ks"),
        tested="contract",
    ),
)

"""The Self-Forcing family: chunk-causal Wan, as its repositories run it. All but one call their model `CausalWanModel`.

Noisy passes write keys and values in place, at the position of the current chunk. A reused block leaves that position
as it was. The clean pass is always computed, and overwrites it before any later chunk reads it. This works for blocks
that find their position by their own cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from holdover.models.adapter import Adapter, any_model


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


def recomputes(block: nn.Module, *args: Any, block_mask: Any = None, kv_cache: Any = None, **kwargs: Any) -> bool:
    """Krea and LongLive write keys and values of the whole context again, in a pass over clean frames with a mask."""
    return block_mask is not None and kv_cache is not None


def caches(
    block: nn.Module, *args: Any, cache_vision: bool = False, ar_txt_inference: bool = False, **kwargs: Any
) -> bool:
    """HY-WorldPlay's passes over the text and over clean context."""
    return cache_vision or ar_txt_inference


def _causal_wan(family: str, **more: Any) -> Adapter:
    fields: dict[str, Any] = {
        "grid": grid,
        "tells": any_model,
        "taps": {"modulated": modulated},
        "condition": ("context", "clip_fea", "y"),
    }
    return Adapter(
        model="CausalWanModel",
        family=family,
        blocks=("blocks",),
        hidden="x",
        writes_kv=True,
        autoregressive=True,
        tested="contract",
        **{**fields, **more},
    )


#: The plain one comes last: the others are told apart by what their blocks take.
SELF_FORCING = (
    _causal_wan("Matrix-Game 2", tells=takes("kv_cache_keyboard"), condition=("visual_context", "cond_concat")),
    _causal_wan("Rolling Forcing", tells=takes("updating_cache"), block_kv_update=updating, kv_update=updating),
    _causal_wan(
        "LongLive 2",
        tells=takes("use_relative_rope"),
        refused="every block goes by the first one's place in the KV cache, and one held over falls behind it",
    ),
    _causal_wan(
        "LongLive",
        tells=lambda model: hasattr(model, "_apply_cache_updates"),
        beside=no_update,
        block_kv_update=recomputes,
    ),
    _causal_wan("CausVid", tells=takes("current_end")),
    _causal_wan(
        "Krea realtime",
        tells=lambda model: any(hasattr(module, "fuse_projections") for module in model.modules()),
        block_kv_update=recomputes,
    ),
    _causal_wan("Self-Forcing"),
    Adapter(
        model="HunyuanVideo_1_5_DiffusionTransformer",
        family="HY-WorldPlay",
        blocks=("double_blocks",),
        hidden="img",
        block_kv_update=caches,
        kv_update=caches,
        autoregressive=True,
        action="action",
        condition=("viewmats", "Ks"),
        tested="contract",
    ),
)

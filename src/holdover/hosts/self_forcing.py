"""The Self-Forcing family: chunk-causal Wan, as its repositories run it. All but one call their model `CausalWanModel`.

Noisy passes write K/V in place, at the place of the current chunk. A block that is held over leaves that place as it
was; the clean pass, never served from cache, overwrites it before any later chunk reads it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from holdover.hosts.host import Host, any_model


def takes(argument: str) -> Callable[[Any], bool]:
    """Tells models whose blocks take an argument of that name."""

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
    """LongLive applies what its blocks return to the KV cache once all have run: ends as they are, nothing new."""
    return ((int(kv_cache["global_end_index"]), int(kv_cache["local_end_index"]), None),)


def updating(block: nn.Module, *args: Any, updating_cache: bool = False, **kwargs: Any) -> bool:
    return updating_cache


def caches(
    block: nn.Module, *args: Any, cache_vision: bool = False, ar_txt_inference: bool = False, **kwargs: Any
) -> bool:
    """HY-WorldPlay's passes over the text and over clean context."""
    return cache_vision or ar_txt_inference


def no_vision(block: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """HY-WorldPlay's blocks return the K/V they would add, which is nothing in a noisy pass."""
    return ({},)


def _causal_wan(family: str, **more: Any) -> Host:
    fields: dict[str, Any] = {"grid": grid, "tells": any_model, "taps": {"modulated": modulated}}
    return Host(
        model="CausalWanModel",
        family=family,
        blocks=("blocks",),
        hidden="x",
        writes_kv=True,
        autoregressive=True,
        condition=("context",),
        tested="contract",
        **{**fields, **more},
    )


#: The plain one comes last: the others are told apart by what their blocks take.
SELF_FORCING = (
    _causal_wan("Matrix-Game 2", tells=takes("kv_cache_keyboard")),
    _causal_wan("Rolling Forcing", tells=takes("updating_cache"), block_kv_update=updating, kv_update=updating),
    _causal_wan("LongLive", tells=lambda model: hasattr(model, "_apply_cache_updates"), beside=no_update),
    _causal_wan("CausVid", tells=takes("current_end")),
    _causal_wan("Self-Forcing, Krea realtime"),
    Host(
        model="HunyuanVideo_1_5_DiffusionTransformer",
        family="HY-WorldPlay",
        blocks=("double_blocks",),
        hidden="img",
        beside=no_vision,
        block_kv_update=caches,
        kv_update=caches,
        autoregressive=True,
        action="action",
        condition=("viewmats", "Ks"),
        tested="contract",
    ),
)

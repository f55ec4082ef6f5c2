"""The video and world transformers of diffusers >= 0.40. They are found by name: diffusers is not imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from holdover.models.adapter import Adapter
from holdover.models.noise import of_timestep


def patches(model: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """The token grid of latents ``[..., H, W]`` that the model cuts into patches."""
    size = model.config.patch_size
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    return hidden_states.shape[-2] // height, hidden_states.shape[-1] // width


def packed(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """The token grid of packed latents: the model is told its height and width."""
    told = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return told["height"], told["width"]


def modulated(block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *args: Any) -> Tensor:
    """For Wan's blocks: ``temb`` is ``[B, 6, C]``, or ``[B, L, 6, C]`` where tokens differ in noise."""
    shift, scale = (block.scale_shift_table + temb.float()).unbind(-2)[:2]
    if temb.dim() == 3:
        shift, scale = shift[:, None], scale[:, None]
    output: Tensor = block.norm1(hidden_states.float()) * (1 + scale) + shift
    return output


def told(name: str) -> Callable[..., Tensor]:
    """An argument of a block."""

    def argument(block: Any, *args: Any, **kwargs: Any) -> Tensor:
        value: Tensor = inspect.signature(block.forward).bind(*args, **kwargs).arguments[name]
        return value

    return argument


def modulated_ltx(block: Any, *, hidden_states: Tensor, temb: Tensor, **kwargs: Any) -> Tensor:
    values = block.scale_shift_table + temb.unflatten(-1, (len(block.scale_shift_table), -1))
    shift, scale = values.unbind(-2)[:2]
    output: Tensor = block.norm1(hidden_states) * (1 + scale) + shift
    return output


def modulated_hunyuan(block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *a: Any) -> Any:
    return block.norm1(hidden_states, emb=temb)[0]


def modulated_cosmos(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Any, embedded_timestep: Tensor, temb: Tensor, *args: Any
) -> Any:
    return block.norm1(hidden_states, embedded_timestep, temb)[0]


def first_three(
    rows: Sequence[int], hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *shared: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hidden state, text and modulation have a row per video. The arguments after them are shared."""
    chosen = list(rows)
    return (hidden_states[chosen], encoder_hidden_states[chosen], temb[chosen], *shared), {}


def far_block_writes(block: nn.Module, *args: Any) -> bool:
    flags = args[6] if len(args) > 6 else None
    return bool(flags and flags["is_cache_step"])


def far_writes(model: nn.Module, *args: Any, kv_cache_flag: dict[str, Any] | None = None, **kwargs: Any) -> bool:
    return bool(kv_cache_flag and kv_cache_flag["is_cache_step"])


def refiner_writes(module: nn.Module, *args: Any, kv_cache_mode: str | None = None, **kwargs: Any) -> bool:
    """SANA-WM's refiner and its blocks write for the sink, and for each chunk once it is refined."""
    return kv_cache_mode in ("capture_pre_rope", "inject_and_capture_post_rope")


def beside(axis: int) -> Callable[..., dict[str, Any]]:
    """The channels beside the noisy ones: an image or a mask. They are the last ones on an axis of the latents."""

    def given(model: Any, hidden_states: Tensor, **told: Any) -> dict[str, Any]:
        noisy, channels = model.config.out_channels, hidden_states.shape[axis]
        return {"beside": hidden_states.narrow(axis, noisy, channels - noisy)} if channels > noisy else {}

    return given


def without_noise(model: Any, hidden_states: Tensor, timestep: Tensor, **told: Any) -> dict[str, Any]:
    """The frames ``[B, C, F, H, W]`` or tokens ``[B, L, C]`` that are given, with timesteps of 0: an image."""
    if not isinstance(timestep, Tensor) or timestep.dim() < 2:
        return {}
    axis = 2 if hidden_states.dim() == 5 else 1
    still = timestep.reshape(-1, hidden_states.shape[axis], timestep[0].numel() // hidden_states.shape[axis]) == 0
    places = still.all(-1).all(0).nonzero().flatten()
    return {"without noise": hidden_states.index_select(axis, places)} if len(places) else {}


def image(model: Any, **told: Any) -> dict[str, Any]:
    """An image as channels beside the noisy ones, or as frames without noise."""
    return beside(1)(model, **told) | without_noise(model, **told)


def commanded(model: Any, action_tokens: Any = None, action_noisy_frame_indexes: Any = None, **told: Any) -> Any:
    """Actions, unless they are denoised as well."""
    noisy = any(len(indexes) for indexes in action_noisy_frame_indexes or ())
    return {} if action_tokens is None or noisy else {"action_tokens": action_tokens}


def of_diffusers(model: Any) -> bool:
    """HY-WorldPlay has a chunk-causal model of the same name."""
    return "is_cache" not in inspect.signature(model.forward).parameters


#: What steers a model of Wan's family: text, and tokens of an image.
WAN = ("encoder_hidden_states", "encoder_hidden_states_image")
TEXT = ("encoder_hidden_states", "encoder_attention_mask")
#: A model that returns a flow, and is told ``1000·σ``.
FLOW: dict[str, Any] = {"prediction": "flow", "noise": of_timestep}
#: A distilled one, whose stages have noise levels of their own, or which returns a mean flow over a step.
UNKNOWN: dict[str, Any] = {"prediction": None, "noise": None}


def _wan(model: str, family: str, **more: Any) -> Adapter:
    """A model of Wan's blocks: ``block(hidden_states, encoder_hidden_states, temb, ...)``."""
    fields = {
        "blocks": ("blocks",),
        "taps": {"modulated": modulated, "time projection": told("temb")},
        "embedding": "condition_embedder",
        "rows": first_three,
        "grid": patches,
        "condition": WAN,
        "given": beside(1),
        **FLOW,
    }
    return Adapter(model=model, family=family, **{**fields, **more})


DIFFUSERS = (
    _wan(
        "WanTransformer3DModel",
        "Wan 2.1 and 2.2, text and image to video",
        given=image,
        tells=of_diffusers,
        tested="pipeline",
    ),
    _wan(
        "WanVACETransformer3DModel",
        "Wan VACE",
        condition=(*WAN, "control_hidden_states", "control_hidden_states_scale"),
    ),
    # The features of the face enter between blocks.
    _wan("WanAnimateTransformer3DModel", "Wan Animate", condition=(*WAN, "pose_hidden_states", "face_pixel_values")),
    _wan("ChronoEditTransformer3DModel", "ChronoEdit"),
    _wan("SkyReelsV2Transformer3DModel", "SkyReels-V2, diffusion forcing too", condition=(*WAN, "fps")),
    # Its tokens begin with a history of other sizes and noise. Each video has its own rotary embedding.
    _wan(
        "HeliosTransformer3DModel",
        "Helios",
        grid=None,
        rows=None,
        given=None,
        **UNKNOWN,
        taps={"modulated": modulated},
        embedding="",
    ),
    _wan("AnyFlowTransformer3DModel", "AnyFlow", given=None, **UNKNOWN),
    _wan(
        "AnyFlowFARTransformer3DModel",
        "AnyFlow FAR, chunk-causal with a KV cache",
        **UNKNOWN,
        given=None,
        rows=None,  # the KV cache counts its batch on another axis
        block_kv_update=far_block_writes,
        kv_update=far_writes,
        autoregressive=True,
        tested="pipeline",
    ),
    Adapter(
        model="CosmosTransformer3DModel",
        family="Cosmos 1, 2 and 2.5",
        taps={"modulated": modulated_cosmos},
        grid=patches,
        # What a control network adds is made of the noisy latents anew in every pass.
        condition=("encoder_hidden_states", "attention_mask", "fps", "condition_mask", "padding_mask"),
    ),
    Adapter(
        model="Cosmos3OmniTransformer",
        family="Cosmos 3",
        blocks=("layers",),
        hidden="gen_seq",
        returns=1,
        condition=("input_ids", "action_domain_ids"),
        given=commanded,
        action="action_tokens",
    ),
    Adapter(
        model="HunyuanVideoTransformer3DModel",
        family="HunyuanVideo",
        blocks=("transformer_blocks", "single_transformer_blocks"),
        taps={"modulated": modulated_hunyuan},
        grid=patches,
        condition=(*TEXT, "pooled_projections", "guidance"),
        given=beside(1),
        **FLOW,
    ),
    Adapter(
        model="HunyuanVideo15Transformer3DModel",
        family="HunyuanVideo 1.5",
        taps={"modulated": modulated_hunyuan},
        grid=patches,
        condition=(*TEXT, "encoder_hidden_states_2", "encoder_attention_mask_2", "image_embeds"),
        given=beside(1),
        **FLOW,
    ),
    # Its tokens begin with a history of other sizes.
    Adapter(
        model="HunyuanVideoFramepackTransformer3DModel",
        family="FramePack",
        blocks=("transformer_blocks", "single_transformer_blocks"),
        taps={"modulated": modulated_hunyuan},
        condition=(*TEXT, "pooled_projections", "image_embeds", "guidance"),
        **FLOW,
    ),
    Adapter(
        model="LTXVideoTransformer3DModel",
        family="LTX-Video",
        taps={"modulated": modulated_ltx},
        grid=packed,
        condition=TEXT,
        given=without_noise,
        **FLOW,
    ),
    Adapter(
        model="LTX2VideoTransformer3DModel",
        family="LTX-2, video with sound",
        grid=packed,
        condition=(
            *TEXT,
            "audio_encoder_hidden_states",
            "audio_encoder_attention_mask",
            "fps",
            "video_keyframes_mask",
            "video_self_attention_mask",
        ),
        given=without_noise,
    ),
    Adapter(
        model="CogVideoXTransformer3DModel",
        family="CogVideoX",
        taps={"time embedding": told("temb")},
        grid=patches,
        condition=("encoder_hidden_states", "ofs"),
        given=beside(2),
        tested="pipeline",
        prediction="v",
    ),
    Adapter(model="MochiTransformer3DModel", family="Mochi", grid=patches, condition=TEXT),
    Adapter(model="AllegroTransformer3DModel", family="Allegro", grid=patches, condition=(*TEXT, "attention_mask")),
    Adapter(
        model="SanaVideoTransformer3DModel",
        family="SANA-Video",
        grid=patches,
        condition=(*TEXT, "attention_mask", "guidance"),
    ),
    Adapter(
        model="SanaWMTransformer3DModel",
        family="SANA-WM, camera-controlled",
        blocks=("blocks",),
        hidden="x",
        condition=(*TEXT, "mask", "camera_conditions", "chunk_plucker", "raymats"),
        given=without_noise,
        action="camera_conditions",
    ),
    Adapter(
        model="SanaWMLTX2RefinerTransformer3DModel",
        family="SANA-WM's refiner, chunk-causal with a KV cache",
        taps={"modulated": modulated_ltx},
        block_kv_update=refiner_writes,
        kv_update=refiner_writes,
        condition=TEXT,
        autoregressive=True,
        tested="pipeline",
    ),
)

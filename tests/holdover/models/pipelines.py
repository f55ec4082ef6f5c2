"""Whole pipelines of diffusers, tiny: text encoder, scheduler, transformer; latents come out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.holdover.models.inputs import COLUMNS, ROWS, TEXT, WAN, fixed
from tests.holdover.models.models import TINY

#: Wan 2.2: the share of the noise down to which the first transformer works.
BOUNDARY = 0.5
WORDS = ("[PAD]", "[UNK]", "a", "car", "turns", "left")


def encoder() -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(1)
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return {
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"),
        "text_encoder": T5EncoderModel(config).eval(),
    }


def transformer(name: str, **config: Any) -> Any:
    tiny = next(tiny for tiny in TINY if tiny.name == name)
    return replace(tiny, config={**tiny.config, **config}).make()


def wan(kind: Any = None, *, vae: Any = None, **parts: Any) -> Any:
    import diffusers

    pipe = (kind or diffusers.WanPipeline)(
        **encoder(),
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        **{"transformer": transformer("WanTransformer3DModel"), **parts},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_22() -> Any:
    """Wan 2.2: one transformer for much noise, another for little."""
    return wan(transformer_2=transformer("WanTransformer3DModel", eps=1e-2), boundary_ratio=BOUNDARY)


def wan_animated() -> Any:
    """Wan 2.1, image to video: the image comes as latents beside the noisy ones, and as tokens beside the text."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    size = {"height": 16, "width": 16}
    return _animated(
        image_encoder=CLIPVisionModel(config).eval(),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size),
        transformer=transformer("WanTransformer3DModel", in_channels=12, image_dim=8, added_kv_proj_dim=24),
    )


def wan_22_animated() -> Any:
    """Wan 2.2, image to video: the image comes as latents alone."""
    first, second = (transformer("WanTransformer3DModel", in_channels=12, eps=eps) for eps in (1e-6, 1e-2))
    return _animated(transformer=first, transformer_2=second, boundary_ratio=BOUNDARY)


def wan_22_small() -> Any:
    """Wan 2.2 at 5B: the image is the first latent frame, whose tokens have no noise."""
    return _animated(expand_timesteps=True)


def _animated(**parts: Any) -> Any:
    import diffusers

    torch.manual_seed(2)
    sizes = {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    vae = diffusers.AutoencoderKLWan(
        **sizes, temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    return wan(diffusers.WanImageToVideoPipeline, vae=vae.eval(), **parts)


def picture(seed: int) -> Tensor:
    """What a video begins with, ``[3, H, W]``."""
    return torch.rand(3, 16 * ROWS, 16 * COLUMNS, generator=torch.Generator().manual_seed(seed))


def cogvideox() -> Any:
    """CogVideoX: its guidance runs as one batch, its scheduler counts no steps."""
    import diffusers

    pipe = diffusers.CogVideoXPipeline(
        **encoder(),
        vae=None,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        transformer=transformer("CogVideoXTransformer3DModel"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def far() -> Any:
    import diffusers

    pipe = diffusers.AnyFlowFARPipeline(
        **encoder(),
        vae=None,
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
        transformer=transformer("AnyFlowFARTransformer3DModel"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def refiner() -> Any:
    """SANA-WM's second stage: its text encoder is left out."""
    import diffusers

    class Refiner(diffusers.SanaWMLTX2Refiner):
        def _encode_prompt(self, prompt: str, *, device: Any, dtype: Any) -> tuple[Tensor, Tensor]:
            return fixed(1, TEXT, 16), torch.ones(1, TEXT)

    pipe = Refiner(
        transformer=transformer("SanaWMLTX2RefinerTransformer3DModel"),
        connectors=None,
        tokenizer=None,
        text_encoder=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start(seed: int = 0, frames: int = 3) -> Tensor:
    shape = 1, WAN["in_channels"], frames, 2 * ROWS, 2 * COLUMNS
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def video(
    pipe: Any,
    *,
    seed: int = 0,
    prompt: str | None = "a car turns left",
    steps: int = 6,
    turned: bool = False,
    **more: Any,
) -> Tensor:
    """The latents that the pipeline makes of noise; ``turned``: it wants frames before channels."""
    noise = start(seed)
    frames: Tensor = pipe(
        prompt=prompt,
        latents=noise.transpose(1, 2) if turned else noise,
        num_inference_steps=steps,
        height=16 * ROWS,
        width=16 * COLUMNS,
        max_sequence_length=5,
        output_type="latent",
        return_dict=False,
        **more,
    )[0]
    return frames

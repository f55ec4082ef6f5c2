"""Whole pipelines of diffusers, tiny: text encoder, scheduler, transformer; latents come out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.hosts.models import COLUMNS, ROWS, TINY, WAN

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


def transformer(name: str) -> Any:
    return next(tiny for tiny in TINY if tiny.name == name).make()


def wan(kind: Any = None) -> Any:
    import diffusers

    pipe = (kind or diffusers.WanPipeline)(
        **encoder(),
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=transformer("WanTransformer3DModel"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def start(seed: int = 0, frames: int = 3) -> Tensor:
    shape = 1, WAN["in_channels"], frames, 2 * ROWS, 2 * COLUMNS
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def video(
    pipe: Any,
    *,
    seed: int = 0,
    prompt: str = "a car turns left",
    steps: int = 6,
    turned: bool = False,
    **more: Any,
) -> Tensor:
    """The latents that the pipeline makes of noise; ``turned``: it wants frames before channels."""
    noise = start(seed)
    frames: Tensor = pipe(
        prompt,
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

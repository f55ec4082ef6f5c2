"""FlashDreams' own classes on a processor, tiny: its kernels for rotation and attention need CUDA, so ours stand in."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("flashdreams", reason="of tests/holdover/requirements.txt")

ROWS, COLUMNS, FRAMES, CHUNK, CHANNELS = 4, 6, 6, 2, 4


def rotate(x: Tensor, freqs: Tensor, interleaved: bool = False, inplace: bool = True, **_: Any) -> Tensor:
    """``x [B, S, H, D]``, turned in place by ``freqs [S, 1, 1, D]``, which name every angle twice."""
    assert inplace
    half = x.shape[-1] // 2
    angles = freqs[..., ::2] if interleaved else freqs[..., :half]
    cos, sin = angles.float().cos().movedim(0, 1), angles.float().sin().movedim(0, 1)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = a * cos - b * sin, b * cos + a * sin
    return x.copy_(torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1))


kernel = ModuleType("flashdreams.core.attention.rope_kernel")
kernel.apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]
#: As a package without its own ``__init__``, which imports text encoders that take long to import and are not used.
recipe = ModuleType("flashdreams.recipes.wan")
recipe.__path__ = [str(Path(find_spec("flashdreams").origin).parent / "recipes" / "wan")]  # type: ignore
sys.modules |= {module.__name__: module for module in (kernel, recipe)}

from flashdreams.core.attention import cp  # noqa: E402
from flashdreams.infra.diffusion.model import DiffusionModelConfig  # noqa: E402
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig  # noqa: E402
from flashdreams.infra.diffusion.scheduler.fm_euler import FlowMatchEulerDiscreteSchedulerConfig  # noqa: E402
from flashdreams.infra.diffusion.scheduler.fm_unipc import FlowMatchUniPCSchedulerConfig  # noqa: E402
from flashdreams.infra.pipeline import StreamInferencePipelineConfig  # noqa: E402
from flashdreams.recipes.cosmos.transformer import CosmosTransformerConfig  # noqa: E402
from flashdreams.recipes.cosmos.transformer.impl.network import CosmosDiTNetworkConfig  # noqa: E402
from flashdreams.recipes.template.decoder import TemplateDecoderConfig  # noqa: E402
from flashdreams.recipes.template.encoder import TemplateControlEncoderConfig  # noqa: E402
from flashdreams.recipes.template.transformer import TemplateTransformerConfig  # noqa: E402
from flashdreams.recipes.template.transformer.network import TemplateDiTConfig  # noqa: E402
from flashdreams.recipes.wan.transformer.impl.network import WanDiTNetworkConfig  # noqa: E402
from flashdreams.recipes.wan.transformer.wan21 import Wan21TransformerConfig  # noqa: E402
from flashdreams.recipes.wan.transformer.wan22 import Wan22TransformerConfig  # noqa: E402


def attention(query: Tensor, key: Tensor, value: Tensor, return_lse: bool = False) -> tuple[Tensor, None]:
    return nn.functional.scaled_dot_product_attention(query, key, value), None


cp.torch_sdpa_cudnn = attention

LEVELS = [1000, 750, 500, 250]
SCHEDULERS = {
    "fresh noise": FlowMatchSchedulerConfig(denoising_timesteps=LEVELS, shift=5.0),
    "Euler": FlowMatchEulerDiscreteSchedulerConfig(num_inference_steps=4),
    "UniPC": FlowMatchUniPCSchedulerConfig(num_inference_steps=4),
}


def wan_transformer(**more: Any) -> Wan21TransformerConfig:
    network = WanDiTNetworkConfig(
        text_len=3, in_dim=CHANNELS, out_dim=CHANNELS, dim=24, ffn_dim=32, freq_dim=8, text_dim=5, num_heads=2,
        num_layers=4,
    )  # fmt: skip
    fields = {"network": network, "dtype": torch.float32, "len_t": CHUNK, "window_size_t": FRAMES}
    return Wan21TransformerConfig(**{**fields, "compile_network": False, "use_cuda_graph": False, **more})


def pipeline(transformer: Any, scheduler: str = "fresh noise", **more: Any) -> Any:
    """With seeded weights and noise."""
    torch.manual_seed(0)
    control = {key: more.pop(key) for key in ("encoder", "decoder") if key in more}
    model = DiffusionModelConfig(transformer=transformer, scheduler=SCHEDULERS[scheduler], seed=0, **more)
    return StreamInferencePipelineConfig(name="tiny", diffusion_model=model, **control).setup().eval()


def wan(scheduler: str = "fresh noise", guided: bool = False, context_noise: int = 0, **more: Any) -> Any:
    scale = {"guidance_scale": 2.0} if guided else {}
    return pipeline(wan_transformer(**scale, **more), scheduler, context_noise=context_noise)


def wan22(scheduler: str = "fresh noise") -> Any:
    parts = {f"transformer_{name}_noise": wan_transformer() for name in ("high", "low")}
    return pipeline(Wan22TransformerConfig(**parts, boundary_ratio=0.9), scheduler)


def cosmos(scheduler: str = "fresh noise", **more: Any) -> Any:
    network = CosmosDiTNetworkConfig(
        in_channels=CHANNELS + 1, out_channels=CHANNELS, model_channels=24, num_blocks=4, num_heads=2, adaln_lora_dim=4,
        crossattn_proj_in_channels=5, crossattn_emb_channels=8,
    )  # fmt: skip
    fields = {"network": network, "dtype": torch.float32, "len_t": CHUNK, "window_size_t": FRAMES}
    return pipeline(
        CosmosTransformerConfig(**{**fields, "compile_network": False, "use_cuda_graph": False, **more}), scheduler
    )


def template(scheduler: str = "fresh noise", **more: Any) -> Any:
    config = TemplateTransformerConfig(
        network=TemplateDiTConfig(in_channels=CHANNELS * 8, context_channels=5, model_channels=24, num_heads=2),
        patch_size=(2, 2, 2), len_t=CHUNK, window_size_t=FRAMES, dtype=torch.float32, **more,
    )  # fmt: skip
    encoder = TemplateControlEncoderConfig(control_channels=3, out_channels=CHANNELS, dtype=torch.float32)
    decoder = TemplateDecoderConfig(in_channels=CHANNELS, dtype=torch.float32)
    return pipeline(config, scheduler, encoder=encoder, decoder=decoder)


def begin(pipeline: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A rollout cache; the text, or the template's context, is of this seed."""
    source, config = torch.Generator().manual_seed(seed), pipeline.diffusion_model.transformer.config
    told = [torch.randn(1, 3, 5, generator=source).to(dtype) for _ in range(2)]
    names = ("context", "negative_context") if pipeline.encoder else ("text_embeddings", "negative_text_embeddings")
    context = {**dict(zip(names, told, strict=True)), "height": ROWS, "width": COLUMNS}
    if getattr(config, "guidance_scale", 1.0) == 1.0:
        del context[names[1]]
    return pipeline.initialize_cache(transformer_context=context)


def control(pipeline: Any, chunk: int, seed: int = 0) -> Any:
    """What steers a chunk of the template's; it changes with every third."""
    if pipeline.encoder is None:
        return None
    return torch.randn(1, 3, CHUNK, ROWS, COLUMNS, generator=torch.Generator().manual_seed(100 * seed + chunk // 3))


def chunks(pipeline: Any, rollout: Any, count: int, seed: int = 0, first: int = 0) -> list[Tensor]:
    """Some chunks of a rollout, as FlashDreams' runners make them; noise and control are of this seed."""
    made = []
    for chunk in range(first, first + count):
        pipeline.diffusion_model.rng.manual_seed(100 * seed + chunk)
        made.append(pipeline.generate(chunk, rollout, input=control(pipeline, chunk, seed)))
        pipeline.finalize(chunk, rollout)
    return made


def written(rollout: Any) -> list[Tensor]:
    """Keys and values in the KV caches of a rollout, as far as these are filled."""
    found, left = [], [rollout.transformer_cache]
    while left:
        value = left.pop()
        if type(value).__name__ == "BlockKVCache":
            found += [held.narrow(value.seq_dim, 0, value.size) for held in (value._k, value._v)]
        elif isinstance(value, list):
            left += value
        elif hasattr(value, "__dict__") and not isinstance(value, Tensor | nn.Module):
            left += [item for name, item in sorted(vars(value).items()) if name != "rope_adapter"]
    return found

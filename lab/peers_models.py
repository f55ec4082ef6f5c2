"""The models that libraries are compared on: transformers of diffusers, in small, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

#: Latent frames, rows and columns of tokens, and text tokens of a pass.
FRAMES, ROWS, COLUMNS, TEXT = 3, 8, 12, 16


@dataclass(frozen=True)
class Subject:
    """A model class of diffusers: the name of its blocks, its sizes by their number, and the arguments of a pass."""

    name: str
    blocks: str
    config: Callable[[int], dict[str, Any]]
    inputs: Callable[[Tensor, float], dict[str, Any]]

    def make(self, blocks: int) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = getattr(import_module("diffusers"), self.name)(**self.config(blocks))
        return model.eval().requires_grad_(False)


def _wan(blocks: int) -> dict[str, Any]:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": blocks}
    return {**sizes, "in_channels": 16, "out_channels": 16, "text_dim": 64, "freq_dim": 64, "rope_max_seq_len": 64}


def _wide(blocks: int) -> dict[str, Any]:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": blocks}
    return {**sizes, "in_channels": 16, "out_channels": 16}


def _text(width: int = 64) -> Tensor:
    return torch.linspace(-1, 1, TEXT * width).reshape(1, TEXT, width)


SUBJECTS = (
    Subject(
        "WanTransformer3DModel",
        "blocks",
        _wan,
        lambda x, t: {"hidden_states": x, "timestep": torch.tensor([t]), "encoder_hidden_states": _text()},
    ),
    Subject(
        "LTXVideoTransformer3DModel",
        "transformer_blocks",
        lambda blocks: {**_wide(blocks), "cross_attention_dim": 128, "caption_channels": 64},
        lambda x, t: {
            "hidden_states": x[..., ::2, ::2].flatten(2).transpose(1, 2),
            "encoder_hidden_states": _text(),
            "timestep": torch.tensor([t]),
            "encoder_attention_mask": torch.ones(1, TEXT).bool(),
            "num_frames": FRAMES,
            "height": ROWS,
            "width": COLUMNS,
        },
    ),
    Subject(
        "MochiTransformer3DModel",
        "transformer_blocks",
        lambda blocks: {
            **_wide(blocks),
            "pooled_projection_dim": 64,
            "text_embed_dim": 64,
            "max_sequence_length": TEXT,
        },
        lambda x, t: {
            "hidden_states": x,
            "encoder_hidden_states": _text(),
            "timestep": torch.tensor([t]),
            "encoder_attention_mask": torch.ones(1, TEXT),
        },
    ),
)


def drift() -> Iterator[Tensor]:
    """Latents ``[1, 16, F, 2H, 2W]`` that change slightly from pass to pass."""
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, FRAMES, 2 * ROWS, 2 * COLUMNS, generator=source)
    while True:
        yield latents.clone()
        latents = latents + 0.01 * torch.randn(latents.shape, generator=source)

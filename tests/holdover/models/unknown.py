"""A model that nobody has declared: its hidden state comes second and leaves second, its blocks write K/V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, text: Tensor, *, video: Tensor, kv: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        kv["k"].copy_(self.mix(video))
        return text.mean(1), video + torch.tanh(kv["k"])


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(3))})
        self.idle = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.kv = [{"k": torch.zeros(1, 6, 8)} for _ in range(3)]

    def forward(self, video: Tensor, strength: float) -> Tensor:
        text = torch.ones(1, 2, 8)
        for layer, kv in zip(self.inside["layers"], self.kv, strict=True):
            _, video = layer(text, video=video * strength, kv=kv)
        return video


def bare() -> nn.Module:
    return Unknown().requires_grad_(False)


def with_inputs() -> tuple[nn.Module, dict[str, Any]]:
    return bare(), {"video": torch.ones(1, 6, 8), "strength": 1.0}


def nothing() -> str:
    return "no model"

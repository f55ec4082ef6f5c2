"""Reuse and gradients do not go together: a reused span would drop its share of the gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread; gradient checkpointing then computes blocks again."""
    graph_task: int = torch._C._current_graph_task_id()
    return graph_task != -1


def recorded(modules: Iterable[nn.Module]) -> bool:
    """Whether gradients of these modules' parameters are recorded where gradients are enabled."""
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def warn() -> None:
    warnings.warn(
        "gradients are being recorded, so every block is computed; run inference under torch.no_grad()", stacklevel=5
    )

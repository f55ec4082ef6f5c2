"""Known models, found by the name of their class."""

from __future__ import annotations

from typing import Any

from torch import nn

from holdover.models.adapter import Adapter
from holdover.models.diffusers import DIFFUSERS
from holdover.models.flashdreams import FLASHDREAMS
from holdover.models.self_forcing import RECOMPUTING, SELF_FORCING

#: The attributes with which ``torch.compile`` and data parallelism wrap a model.
WRAPPERS = ("_orig_mod", "module")


def adapters() -> tuple[Adapter, ...]:
    """Every known model."""
    return (*DIFFUSERS, *SELF_FORCING, *FLASHDREAMS)


def unwrapped(model: Any) -> Any:
    """The model within its wrappers."""
    for name in WRAPPERS:
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    return model


def find(model: nn.Module) -> Adapter | None:
    """The adapter for a model's class, or for the nearest class that it derives from; None if it is unknown."""
    for cls in type(model).__mro__:
        for adapter in adapters():
            if adapter.model == cls.__name__ and adapter.tells(model):
                return adapter
    return None


def models_markdown() -> str:
    """The table of docs/models.md."""
    tested = {
        "class": "the class, tiny",
        "pipeline": "the class and a pipeline, tiny",
        "contract": "a contract of its blocks",
    }
    lines = [
        "| model | class | tokens | returns | KV writes | batch | taps | tested |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for adapter in adapters():
        told = "told by the step" if adapter.autoregressive else "none"
        if adapter.kv_update is not None:
            recomputing = adapter.kv_update in RECOMPUTING
            told = "told by the step, recomputing by the pass" if recomputing else "told by the pass"
        cells = [
            adapter.family,
            f"`{adapter.model}`",
            "on a grid" if adapter.grid else "a sequence",
            adapter.prediction or "not known",
            told,
            "row by row" if adapter.rows else "whole",
            ", ".join(adapter.tapped) or "none",
            f"refused: {adapter.refused}" if adapter.refused else tested[adapter.tested],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

"""Known models, found by the name of their class."""

from __future__ import annotations

from torch import nn

from holdover.models.diffusers import DIFFUSERS
from holdover.models.host import Host
from holdover.models.self_forcing import SELF_FORCING

#: Wrappers that change nothing but the name: ``torch.compile``, data parallelism.
WRAPPERS = ("_orig_mod", "module")


def hosts() -> tuple[Host, ...]:
    """Every known model."""
    return (*DIFFUSERS, *SELF_FORCING)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within wrappers that change nothing."""
    for name in WRAPPERS:
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    return model


def find(model: nn.Module) -> Host | None:
    """What is known of a model's class, or of the nearest class that it derives from."""
    for cls in type(model).__mro__:
        for host in hosts():
            if host.model == cls.__name__ and host.tells(model):
                return host
    return None


def models_markdown() -> str:
    """The table of docs/models.md."""
    tested = {
        "class": "the class, tiny",
        "pipeline": "the class and a pipeline, tiny",
        "contract": "a contract of its blocks",
    }
    lines = [
        "| model | class | tokens | KV writes | batch | modulated input | tested |",
        "|---|---|---|---|---|---|---|",
    ]
    for host in hosts():
        told = "told by the step" if host.autoregressive else "none"
        if host.kv_update or host.block_kv_update:
            told = "told by the pass" if host.kv_update else "told by the step, recomputing by the pass"
        cells = [
            host.family,
            f"`{host.model}`",
            "on a grid" if host.grid else "a sequence",
            told,
            "row by row" if host.rows else "whole",
            "yes" if "modulated" in host.taps else "no",
            f"refused: {host.refused}" if host.refused else tested[host.tested],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

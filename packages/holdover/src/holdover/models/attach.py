"""`holdover.attach`: the engine's, for known models without naming their blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import nn

from holdover.engine import attach as engine
from holdover.engine.audit import Audit
from holdover.engine.cache import Cache
from holdover.method import Policy
from holdover.models.registry import find, unwrapped
from holdover.slot import Slot, ViewGroup


def attach(
    model: nn.Module,
    policy: Policy | Sequence[Policy],
    *,
    slots: Sequence[Slot | nn.Module | str] | None = None,
    view_groups: Sequence[ViewGroup] | Callable[..., Sequence[ViewGroup]] | None = None,
    audit: float | Audit = 0.0,
    max_bytes: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Cache:
    """Let a policy decide, block by block, what of a model is computed.

    Args:
        model: the transformer; every forward of it now happens within ``with cache.step(...)``.
        policy: a caching method, such as ``holdover.xcache()``; or several of different levels, outermost first.
        slots: its blocks, in the order in which it runs them: module names, modules, or `Slot`s where the hidden state
            is not the first argument. None asks ``model.holdover_slots()``, then the known models (docs/models.md), or
            takes the model itself for a policy of that level. A block returns its hidden state, or a tuple with it;
            when it is reused, the other items are those it returned when last computed, or what the slot says.
        view_groups: how the tokens of a hidden state ``[B, L, C]`` are laid out per latent frame. None asks
            ``model.holdover_view_groups()``, then the known models; without either, tokens are taken as a plain
            sequence. A function of the model and the arguments of its forward is asked at every pass.
        audit: share of reused spans to compute as well, for their relative error in the trace and the stats. The output
            stays the reused one. Past the limit of an `Audit`, warns once and computes the stream until reset.
        max_bytes: of held tensors per stream; slots that do not fit are computed.
        process_group: ranks that run the model together; a span that one of them computes, all compute.

    Returns:
        The cache, also a context manager that detaches at its end.

    Raises:
        ValueError: an argument is out of range, the model's blocks cannot be found, or a cache is attached already.
    """
    if slots is None:
        model = unwrapped(model)
    host = None if hasattr(model, "holdover_slots") else find(model)
    if host is not None:
        innermost = policy if isinstance(policy, Policy) else policy[-1]
        if slots is None and innermost.level == "block":
            slots = host.slots(model)
        if view_groups is None and host.grid is not None and innermost.level == "block":
            view_groups = host.view_groups
    return engine.attach(
        model,
        policy,
        slots=slots,
        view_groups=view_groups,
        audit=audit,
        max_bytes=max_bytes,
        process_group=process_group,
    )

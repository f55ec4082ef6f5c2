"""`holdover.attach`, which knows the blocks of many models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import nn

from holdover.engine import attach as engine
from holdover.engine.audit import Audit
from holdover.engine.cache import Cache
from holdover.method import Policy
from holdover.models.adapter import EMBEDDING
from holdover.models.embedding import Embedding
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
    trace: int = engine.TRACE,
) -> Cache:
    """Attach a caching policy to a model: block by block, it decides what is computed and what is reused.

    Args:
        model: the transformer. From now on every forward of it runs within ``with cache.step(...)``.
        policy: a caching method, such as ``holdover.xcache()``, or a list of them, one per level, outermost first.
        slots: the blocks of the model, in the order in which it runs them: module names, modules, or `Slot`s where the
            hidden state is not the first argument. None asks ``model.holdover_slots()``, then the known models
            (docs/models.md). A policy of level "model" takes the model itself. A block returns its hidden state, or a
            tuple with it. A reused block returns the other items as it returned them when last computed, or as the slot
            says.
        view_groups: how the tokens of a hidden state ``[B, L, C]`` are laid out per latent frame. None asks
            ``model.holdover_view_groups()``, then the known models; without either, tokens are a plain sequence. A
            function of the model and the arguments of its forward is called at every pass.
        audit: the share of reused spans that are computed as well, for their relative error in trace and stats. The
            output stays the reused one. Past the limit of an `Audit`, the cache warns once and computes the stream in
            full until it is reset.
        max_bytes: of held tensors per stream. Slots that do not fit are computed.
        trace: how many decisions the trace keeps; the oldest are dropped, and counts go on.
        process_group: ranks that run the model together. A span that one of them computes, all compute.

    Returns:
        The cache. It is also a context manager, which detaches at its end.

    Raises:
        ValueError: an argument is out of range, the model's blocks cannot be found, or a cache is attached already.
    """
    if slots is None:
        model = unwrapped(model)
    adapter = None if hasattr(model, "holdover_slots") else find(model)
    innermost = policy if isinstance(policy, Policy) else policy[-1] if policy else None
    embedding = None
    if adapter is not None and innermost is not None and innermost.level == "block":
        if slots is None:
            if adapter.embedding and getattr(innermost.trigger.signal, "of", None) == EMBEDDING:
                embedding = Embedding(model.get_submodule(adapter.embedding))
            slots = adapter.slots(model, {} if embedding is None else {EMBEDDING: embedding.tap})
        if view_groups is None and adapter.grid is not None:
            view_groups = adapter.view_groups
    cache = engine.attach(
        model,
        policy,
        slots=slots,
        view_groups=view_groups,
        audit=audit,
        max_bytes=max_bytes,
        process_group=process_group,
        trace=trace,
    )
    if embedding is not None:
        embedding.watch()
        cache.remove_with(embedding)
    return cache

"""`holdover.attach`, which knows the blocks of many models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import nn

from holdover.engine import attach as engine
from holdover.engine.audit import Audit
from holdover.engine.cache import Cache
from holdover.method import Policy
from holdover.models.adapter import EMBEDDING, Adapter
from holdover.models.announced import Announced
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
    policies = [policy] if isinstance(policy, Policy) else list(policy)
    # A network that was compiled whole stays whole where it is called or not called, and nothing inside is touched.
    innermost = policies[-1] if policies else None
    if slots is None and (innermost is None or innermost.level != "model"):
        model = unwrapped(model)
    adapter = None if hasattr(model, "holdover_slots") else find(unwrapped(model))
    embedding = None
    if slots is None:
        _refuse(unwrapped(model), adapter, policies)
    if adapter is not None and innermost is not None:
        if slots is None:
            slots = [adapter.whole()] if any(policy.level == "model" for policy in policies) else []
            if innermost.level == "block":
                if adapter.embedding and getattr(innermost.trigger.signal, "of", None) == EMBEDDING:
                    embedding = Embedding(model.get_submodule(adapter.embedding))
                slots += adapter.slots(model, {} if embedding is None else {EMBEDDING: embedding.tap})
        if innermost.level == "block" and view_groups is None and adapter.grid is not None:
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
    if adapter is not None and (adapter.kv_update is not None or adapter.place is not None):
        cache.remove_with(Announced(adapter, model, cache))
    return cache


def _refuse(model: nn.Module, adapter: Adapter | None, policies: Sequence[Policy]) -> None:
    """Say what cannot be attached to a model whose slots are not named, and what can.

    Raises:
        ValueError: a module within it is the known model, the policy needs slots that known models do not declare, or
            nothing of this model can be reused.
    """
    if adapter is None:
        known = [name for name, child in model.named_children() if find(unwrapped(child)) is not None]
        if known and not hasattr(model, "holdover_slots"):
            raise ValueError(
                f"{type(model).__name__} is not the model itself, which is its {known[0]!r}; attach to that: "
                f"holdover.attach(x.{known[0]}, policy)"
            )
        return
    if any(policy.predictor is not None for policy in policies):
        adapter.require_reusable(model)
    for policy in policies:
        if isinstance(policy, Policy) and policy.level == "sublayer":
            raise ValueError(
                f"{policy.name} works within blocks, and adapters of known models declare blocks alone; name their "
                f"attention modules and MLPs: attach(model, policy, "
                f"slots=[holdover.Slot('{adapter.blocks[0]}.0.attn1', kind='spatial'), ...])"
            )

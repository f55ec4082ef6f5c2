"""Attaching policies to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import nn

from holdover.engine.audit import Audit
from holdover.engine.blocks import find_blocks, find_view_groups
from holdover.engine.cache import Cache
from holdover.engine.copies import MARK
from holdover.engine.runtime import Runtime
from holdover.engine.trace import Trace
from holdover.method import Policy
from holdover.slot import Slot, ViewGroup

#: How many decisions the trace keeps by default: some 40 MB of them.
TRACE = 100_000

#: From the outside inwards.
LEVELS = ("model", "block", "sublayer")


def attach(
    model: nn.Module,
    policies: Policy | Sequence[Policy],
    *,
    slots: Sequence[Slot | nn.Module | str] | None = None,
    view_groups: Sequence[ViewGroup] | Callable[..., Sequence[ViewGroup]] | None = None,
    audit: float | Audit = 0.0,
    max_bytes: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    trace: int = TRACE,
) -> Cache:
    """`holdover.attach`, where its arguments are explained, for a model that declares its slots or is told them.

    Raises:
        ValueError: an argument is out of range, the model's blocks cannot be found, or a cache is attached already.
    """
    policies = [policies] if isinstance(policies, Policy) else list(policies)
    _check(model, policies, slots, max_bytes)
    audit = audit if isinstance(audit, Audit) else Audit(audit)
    kept, runtimes = Trace(trace), []
    for n, policy in enumerate(policies):
        own_slots = _own_slots(slots, policy, innermost=n == len(policies) - 1)
        blocks = find_blocks(model, own_slots, policy.level)
        writing = [block.name for block in blocks if block.slot.writes_kv]
        if audit.rate > 0 and writing:
            raise ValueError(
                f"audit={audit.rate} would run block {writing[0]!r} twice, and it writes keys and values in place; "
                f"pass audit=0"
            )
        runtime = Runtime(
            policy=policy,
            blocks=blocks,
            view_groups=() if callable(view_groups) else find_view_groups(model, view_groups),
            audit=audit,
            max_bytes=max_bytes,
            process_group=process_group,
            trace=kept,
            innermost=n == len(policies) - 1,
        )
        if policy.trigger.by_frame and not (runtime.view_groups or callable(view_groups)):
            raise ValueError(
                f"{policy.name} tells latent frames apart, and {type(model).__name__} does not say how their tokens "
                f"lie; give the grids of one latent frame: attach(view_groups=[holdover.ViewGroup(...)])"
            )
        runtimes.append(runtime)
    cache = Cache(model, runtimes)
    if callable(view_groups):
        cache.ask_view_groups(model, view_groups)
    return cache


def _own_slots(
    slots: Sequence[Slot | nn.Module | str] | None, policy: Policy, *, innermost: bool
) -> Sequence[Slot | nn.Module | str] | None:
    """Of the given slots those of one policy: the model as a whole is its level's, the others are the innermost's."""
    whole = [slot for slot in slots or () if isinstance(slot, Slot) and slot.kind == "model"]
    if whole and policy.level == "model":
        return whole
    if slots is None or not innermost:
        return None
    others = [slot for slot in slots if slot not in whole]
    return others if others or not whole else None


def _check(model: nn.Module, policies: Sequence[Policy], slots: Sequence[object] | None, max_bytes: int | None) -> None:
    for policy in policies:
        if not isinstance(policy, Policy):
            raise ValueError(f"{policy!r} is not a policy; give holdover.policy(name, ...), or a list of them")
    attached = sorted(name for name, module in model.named_modules() if MARK in module.__dict__)
    if attached:
        name = attached[-1] if len(attached) == 1 else attached[1]  # a block's rather than the model's, which is ""
        name = name or type(model).__name__
        raise ValueError(f"a cache is attached to {name!r} already; call its detach() first")
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes} is negative; give bytes per stream and policy, or None for no cap")
    levels = [LEVELS.index(policy.level) for policy in policies]
    if not levels or levels != sorted(set(levels)):
        told = ", ".join(f"{policy.name} ({policy.level})" for policy in policies) or "none"
        raise ValueError(f"policies are {told}; give one per level, outermost first: {', '.join(LEVELS)}")

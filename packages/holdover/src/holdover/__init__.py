"""Holdover makes video world models fast without training them.

with holdover.attach(model, holdover.xcache()) as cache:
    with cache.step(chunk=n, index=i, num_steps=4, sigma=sigma, action=action, commits=n % 4 == 0):
        velocity = model(...)
"""

from holdover.decision import Stats
from holdover.engine.audit import Audit
from holdover.engine.cache import Cache
from holdover.engine.snapshot import Snapshot
from holdover.method import Policy
from holdover.methods.fixed_interval import fixed_interval
from holdover.methods.never import never
from holdover.methods.registry import policies, policy
from holdover.methods.xcache import xcache
from holdover.methods.xcache_reactive import xcache_reactive
from holdover.models.attach import attach
from holdover.slot import Slot, ViewGroup
from holdover.step import Step

__all__ = [
    "Audit",
    "Cache",
    "Policy",
    "Slot",
    "Snapshot",
    "Stats",
    "Step",
    "ViewGroup",
    "attach",
    "fixed_interval",
    "never",
    "policies",
    "policy",
    "xcache",
    "xcache_reactive",
]

"""Holdover makes video world models fast without training them.

with holdover.attach(model, holdover.xcache()) as cache:
    with cache.step(chunk=n, index=i, num_steps=4, sigma=sigma, action=action, commits=n % 4 == 0):
        velocity = model(...)
"""

from typing import TYPE_CHECKING

from holdover.lazy import attributes

#: Where each public name is defined. It is imported when it is first used: `import holdover` alone does not need torch.
_WHERE = {
    "Audit": "holdover.engine.audit",
    "Cache": "holdover.engine.cache",
    "Policy": "holdover.method",
    "Slot": "holdover.slot",
    "Snapshot": "holdover.engine.snapshot",
    "Stats": "holdover.decision",
    "Step": "holdover.step",
    "ViewGroup": "holdover.slot",
    "__version__": "holdover.version",
    "attach": "holdover.models.attach",
    "diffusers": "holdover.diffusers",
    "enable": "holdover.pipelines",
    "fixed_interval": "holdover.methods.fixed_interval",
    "never": "holdover.methods.never",
    "policies": "holdover.methods.registry",
    "policy": "holdover.methods.registry",
    "report": "holdover.report",
    "xcache": "holdover.methods.xcache",
    "xcache_reactive": "holdover.methods.xcache_reactive",
}

if TYPE_CHECKING:
    from holdover import diffusers as diffusers
    from holdover import report as report
    from holdover.decision import Stats as Stats
    from holdover.engine.audit import Audit as Audit
    from holdover.engine.cache import Cache as Cache
    from holdover.engine.snapshot import Snapshot as Snapshot
    from holdover.method import Policy as Policy
    from holdover.methods.fixed_interval import fixed_interval as fixed_interval
    from holdover.methods.never import never as never
    from holdover.methods.registry import policies as policies
    from holdover.methods.registry import policy as policy
    from holdover.methods.xcache import xcache as xcache
    from holdover.methods.xcache_reactive import xcache_reactive as xcache_reactive
    from holdover.models.attach import attach as attach
    from holdover.pipelines import enable as enable
    from holdover.slot import Slot as Slot
    from holdover.slot import ViewGroup as ViewGroup
    from holdover.step import Step as Step
    from holdover.version import __version__ as __version__
else:
    __getattr__, __dir__ = attributes(__name__, _WHERE)

__all__ = [*_WHERE]

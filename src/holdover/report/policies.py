"""The registered policies as a table."""

from __future__ import annotations

import inspect

from rich.table import Table

import holdover
from holdover.policies.registry import policies


def policy_table() -> Table:
    """One row per policy: its name, what it does, its options with their defaults."""
    table = Table("policy", "what it does", "options")
    for name in policies():
        method = getattr(holdover, name)
        summary = (inspect.getdoc(method) or "").partition("\n")[0]
        options = [
            "**" if p.kind is p.VAR_KEYWORD else f"{p.name}={p.default!r}"
            for p in inspect.signature(method).parameters.values()
        ]
        table.add_row(name, summary, ", ".join(options))
    return table

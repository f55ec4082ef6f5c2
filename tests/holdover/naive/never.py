"""Computes everything."""

from __future__ import annotations

from typing import Any

from tests.holdover.case import Case


class Never:
    def __init__(self) -> None:
        self.decisions: list[dict[str, Any]] = []

    def runner(self, fields: dict[str, Any], run: Any) -> Any:
        reason = "kv update" if fields.get("role") == "kv_update" else "never"

        def apply(block: int, x: Any, compute: Any) -> Any:
            self.decisions.append({"block": block, "computed": True, "reason": reason, "scores": {}})
            return compute(x)

        return run(apply=apply)


def case() -> Case:
    return Case("never", Never)


DEFAULT = case()
#: Options under which the trigger always computes.
CLOSED = case()
#: Every option away from its default.
VARIED: list[Case] = []

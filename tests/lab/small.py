"""What the tests of several benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def cut_off_before_the_card(
    bench: ModuleType, run: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The figures of a bench that was cut off before it wrote its card, and then went on without driving again."""

    def cut_off(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench, "write_card", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run()
    with monkeypatch.context() as patch:
        patch.setattr(bench, "Race", cut_off)
        return run()

"""Asking a model at every pass how the tokens of its hidden states are laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from holdover.engine.copies import mark, unmark
from holdover.engine.runtime import Runtime
from holdover.slot import ViewGroup


class LayoutHook:
    """A forward pre-hook on the model."""

    def __init__(
        self, model: nn.Module, view_groups: Callable[..., Sequence[ViewGroup]], runtimes: Sequence[Runtime]
    ) -> None:
        self._model, self._view_groups, self._runtimes = model, view_groups, runtimes
        self._handle = model.register_forward_pre_hook(self._ask, with_kwargs=True)
        mark(model, self._clean)

    def remove(self) -> None:
        """Ask no more."""
        self._handle.remove()
        unmark(self._model, self._clean)

    def _ask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        groups = tuple(self._view_groups(module, *args, **kwargs))
        for runtime in self._runtimes:
            runtime.lay_out(groups)

    def _clean(self, state: dict[str, Any]) -> None:
        for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            state[name] = type(state[name])((n, hook) for n, hook in state[name].items() if n != self._handle.id)

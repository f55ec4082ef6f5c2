"""The embedding of the timestep, where a model's blocks are not given it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from holdover.engine.copies import mark, unmark


class Embedding:
    """Keeps what a module of the model gave last: the first of its outputs. `watch` begins, `remove` ends it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._latest: Tensor | None = None

    def watch(self) -> None:
        """Keep it from now on."""
        self._handle = self._module.register_forward_hook(self._keep)
        mark(self._module, self._clean)

    def remove(self) -> None:
        """Keep it no more."""
        self._handle.remove()
        self._latest = None
        unmark(self._module, self._clean)

    def tap(self, block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """`Slot.taps`: that of this pass."""
        assert self._latest is not None
        return self._latest

    def _keep(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._latest = output if isinstance(output, Tensor) else output[0]

    def _clean(self, state: dict[str, Any]) -> None:
        hooks = state["_forward_hooks"]
        state["_forward_hooks"] = type(hooks)((n, hook) for n, hook in hooks.items() if n != self._handle.id)

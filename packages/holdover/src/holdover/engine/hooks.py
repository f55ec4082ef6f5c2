"""Putting a dispatcher in place of a block's forward, and taking it out again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from holdover.engine.blocks import Block
from holdover.engine.copies import mark, unmark


class Shortcuts:
    """The blocks of the pass in progress that need no decision: whether they are computed or give back their input.

    The pass opens them and each is taken once, by the block's dispatcher.
    """

    def __init__(self) -> None:
        #: Blocks that have not run yet: whether they are computed.
        self.left: dict[int, bool] = {}
        #: Blocks of this pass that ran, or were opened.
        self.ran: set[int] = set()
        self._known: dict[tuple[int, int, bool], tuple[dict[int, bool], list[tuple[str, int]]]] = {}

    def open(self, blocks: Sequence[Block], *, computed: bool) -> list[tuple[str, int]]:
        """Ask the pass no more about these blocks; returns the labels of those that this holds for.

        A block that can tell whether a call writes the KV cache is asked at every call.
        """
        if not blocks:
            return []
        key = blocks[0].index, blocks[-1].index, computed
        if key not in self._known:
            found = [block for block in blocks if block.slot.kv_update is None]
            self._known[key] = {block.index: computed for block in found}, [block.label for block in found]
        left, labels = self._known[key]
        self.left.update(left)
        self.ran.update(left)
        return labels

    def close(self) -> set[int]:
        """End the pass; returns the blocks that were opened and never ran."""
        never_ran = set(self.left)
        self.left.clear()
        self.ran.clear()
        return never_ran


class Hook:
    """One slot's dispatcher: an instance attribute ``forward``, or named as another method, so that other instances of
    the class never see it.

    If someone else has wrapped the dispatcher by the time it is removed, it stays inside that wrapper and passes calls
    through; once that wrapper is gone as well, the next call takes it out.
    """

    def __init__(
        self,
        block: Block,
        shortcuts: Shortcuts,
        dispatch: Callable[[Block, tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:
        self._block, self._dispatch = block, dispatch
        self._method = block.slot.method
        self._original = getattr(block.module, self._method)
        self._previous = block.module.__dict__.get(self._method)
        #: What `Module.compile` leaves: it bypasses ``forward``, so it is set aside and called from here.
        self._compiled = block.module._compiled_call_impl if self._method == "forward" else None
        block.compute = self._original if self._compiled is None else self._compute_compiled

        # Decisions must not be traced into a graph; what keeps Dynamo out is too slow for where it is not.
        disable: Callable[..., Callable[..., Any]] = torch.compiler.disable
        untraced = disable(lambda args, kwargs: self._dispatch(block, args, kwargs))
        # Every block of every pass comes by here, and finds the processor's caches emptied by the one before.
        is_traced, shortcut = torch.compiler.is_dynamo_compiling, shortcuts.left.pop
        index, compute, given = block.index, block.compute, block.given

        def forward(*args: Any, **kwargs: Any) -> Any:
            if is_traced():
                return untraced(args, kwargs)
            computed = shortcut(index, None)
            if computed:
                return compute(*args, **kwargs)
            if computed is None:
                return self._dispatch(block, args, kwargs)
            return args[given] if len(args) > given else block.read(args, kwargs)

        # The original's attributes are not copied: those of a compiled function would lead Dynamo past the dispatcher.
        self._forward = functools.wraps(self._original, updated=())(forward)
        mark(block.module, self._clean)
        self._insert()

    def remove(self) -> None:
        """Take the dispatcher out, or leave it as a pass-through where something else wraps it."""
        self._dispatch = self._pass_through
        unmark(self._block.module, self._clean)
        self._withdraw()

    def _clean(self, state: dict[str, Any]) -> None:
        """Take the dispatcher out of a copy of the module's ``__dict__``."""
        if state.get(self._method) is not self._forward:
            return
        if self._previous is None:
            del state[self._method]
        else:
            state[self._method] = self._previous

    def _pass_through(self, _: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._withdraw()
        return self._original(*args, **kwargs)

    def _insert(self) -> None:
        setattr(self._block.module, self._method, self._forward)
        if self._compiled is not None:
            self._block.module._compiled_call_impl = None

    def _withdraw(self) -> None:
        module = self._block.module
        if self._compiled is not None:
            module._compiled_call_impl = self._compiled
        if module.__dict__.get(self._method) is not self._forward:
            return
        if self._previous is None:
            delattr(module, self._method)
        else:
            setattr(module, self._method, self._previous)

    def _compute_compiled(self, *args: Any, **kwargs: Any) -> Any:
        """Run what `Module.compile` made, in the module as it was when that was made."""
        module = self._block.module
        assert self._compiled is not None
        if module.__dict__.get("forward") is not self._forward:
            return self._original(*args, **kwargs)  # a wrapper around this dispatcher must not run twice
        # Hooks must not either: they run around the dispatcher.
        hooks = {name: getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks")}
        self._withdraw()
        module.__dict__.update({name: type(own)() for name, own in hooks.items()})
        try:
            return self._compiled(*args, **kwargs)
        finally:
            module.__dict__.update(hooks)
            self._insert()

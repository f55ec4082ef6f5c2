"""Putting a dispatcher in place of a block's forward, and taking it out again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from holdover.engine.blocks import Block
from holdover.engine.compiled import compiling, own_graph, skipped, uncompiled
from holdover.engine.copies import mark, unmark

#: Told by Dynamo where a graph must not break.
WHY = (
    "Holdover decides here whether this module runs, so no graph goes through it; for fullgraph=True call the module's "
    "own compile() instead of compiling what is around it"
)


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
        self._block, self._dispatch, self._shortcuts = block, dispatch, shortcuts
        self._method = block.slot.method
        self._original = getattr(block.module, self._method)
        self._previous = block.module.__dict__.get(self._method)
        #: What `Module.compile` leaves: it bypasses ``forward``, so it is set aside and called from here.
        self._compiled = block.module._compiled_call_impl if self._method == "forward" else None
        self._own_graph = own_graph(self._original)
        compute: Callable[..., Any] = self._original
        within_compiled = uncompiled(self._within_compiled, WHY)
        # Every block of every pass comes by here, and finds the processor's caches emptied by the one before.
        shortcut, index, given = shortcuts.left.pop, block.index, block.given

        def forward(*args: Any, **kwargs: Any) -> Any:
            if compiling() is not None:
                return within_compiled(args, kwargs)
            computed = shortcut(index, None)
            if computed:
                return compute(*args, **kwargs)
            if computed is None:
                return self._dispatch(block, args, kwargs)
            return args[given] if len(args) > given else block.read(args, kwargs)

        def set_compute() -> None:
            nonlocal compute
            compute = block.compute = self._original if self._compiled is None else self._compute_compiled

        set_compute()
        self._set_compute = set_compute
        # The original's attributes are not copied: those of a compiled function would lead Dynamo past the dispatcher.
        self._forward = skipped(functools.wraps(self._original, updated=())(forward), WHY)
        mark(block.module, self._clean)
        self._insert()

    def remove(self) -> None:
        """Take the dispatcher out, or leave it as a pass-through where something else wraps it."""
        self._dispatch = self._pass_through
        unmark(self._block.module, self._clean)
        self._withdraw()

    def _clean(self, state: dict[str, Any]) -> None:
        """Take the dispatcher out of a copy of the module's ``__dict__``."""
        if self._method == "forward":
            state.pop("compile", None)
        if state.get(self._method) is not self._forward:
            return
        if self._previous is None:
            del state[self._method]
        else:
            state[self._method] = self._previous

    def _pass_through(self, _: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._withdraw()
        compute = self._original if self._block.compute == self._compute_compiled else self._block.compute
        return compute(*args, **kwargs)

    def _insert(self) -> None:
        module = self._block.module
        setattr(module, self._method, self._forward)
        if self._method == "forward":
            module.__dict__["compile"] = self._compile
        if self._compiled is not None:
            module._compiled_call_impl = None

    def _withdraw(self) -> None:
        module = self._block.module
        if self._method == "forward":
            module.__dict__.pop("compile", None)
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

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        """`Module.compile` of an attached module: what it makes runs within the dispatcher, as if it had come first."""
        module = self._block.module
        self._withdraw()
        stepping = module.__dict__.pop("_call_impl", None)  # what an adapter does around a pass stays outside, too
        try:
            module.compile(*args, **kwargs)
        finally:
            if stepping is not None:
                module.__dict__["_call_impl"] = stepping
            self._compiled = module._compiled_call_impl
            self._set_compute()
            self._insert()

    def _within_compiled(self, outside: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call from a compiled function: decide uncompiled, and compute in a graph of the block's own."""
        block, plain = self._block, self._block.compute
        block.compute = compute = functools.partial(outside, self._own_graph if self._compiled is None else plain)
        try:
            computed = self._shortcuts.left.pop(block.index, None)
            if computed is None:
                return self._dispatch(block, args, kwargs)
            return compute(*args, **kwargs) if computed else block.read(args, kwargs)
        finally:
            block.compute = plain

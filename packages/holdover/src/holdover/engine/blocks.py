"""A model's slots, found in it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from holdover.slot import Level, Slot, ViewGroup

#: The keyword that carries the hidden state where a forward's signature does not tell.
HIDDEN_STATES = "hidden_states"


class Block:
    """One slot, found in its model: reads and replaces the hidden state, and runs the original forward."""

    def __init__(self, index: int, name: str, module: nn.Module, slot: Slot) -> None:
        self.index, self.name, self.module, self.slot = index, name, module, slot
        self.label = name, index
        self.compute: Callable[..., Any] = getattr(module, slot.method)
        #: Whether the block was seen to write into none of its arguments.
        self.watched = False
        #: Whether the block overwrites its input; found out when it first runs.
        self.overwrites_input: bool | None = None
        self._position, self._keyword = _argument(self.compute, slot.hidden)
        #: Where the hidden state stands among positional arguments, if there are so many.
        self.given = sys.maxsize if self._position is None else self._position

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The hidden state among a call's arguments."""
        if self.given < len(args):
            hidden = args[self.given]
        elif self._keyword in kwargs:
            hidden = kwargs[self._keyword]
        else:
            raise ValueError(
                f"block {self.name!r} was called without its hidden state (position {self._position}, keyword "
                f"{self._keyword!r}); name the argument with holdover.Slot({self.name!r}, hidden=...)"
            )
        if not isinstance(hidden, Tensor) or hidden.dim() < 2:
            raise ValueError(
                f"the hidden state of block {self.name!r} is {_describe(hidden)}, not a tensor [..., tokens, "
                f"channels]; name the right argument with holdover.Slot({self.name!r}, hidden=...)"
            )
        return hidden

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another hidden state."""
        if self.given < len(args):
            return (*args[: self.given], hidden, *args[self.given + 1 :]), kwargs
        return args, {**kwargs, self._keyword: hidden}

    def take(
        self, rows: Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments for these rows of the batch alone."""
        assert self.slot.rows is not None
        return self.slot.rows(rows, *args, **kwargs)

    def run_part(
        self, tokens: Tensor | None, memory: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Mapping[str, Tensor]]:
        """`Slot.part`: output for these tokens, and the memory afterwards."""
        if self.slot.part is None:
            raise ValueError(
                f"the policy computes a part of block {self.name!r}, which does not say how; give "
                f"holdover.Slot({self.name!r}, part=...)"
            )
        return self.slot.part(self.compute, tokens, memory, args, kwargs)

    def tap(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A tensor that the slot declares."""
        if name not in self.slot.taps:
            raise ValueError(
                f"the policy reads {name!r}, which block {self.name!r} does not declare; give "
                f"holdover.Slot({self.name!r}, taps={{{name!r}: function of the block and its arguments}})"
            )
        return self.slot.taps[name](self.module, *args, **kwargs)

    def split(self, output: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
        """A block's output as hidden state and, where it is a tuple, its other items, those to be held over."""
        at = self.slot.returns
        if isinstance(output, Tensor) and at == 0:
            return output, None
        if type(output) is tuple and len(output) > at and isinstance(output[at], Tensor):
            if self.slot.beside is not None:
                return output[at], ()
            for position, item in enumerate(output):
                empty = isinstance(item, Mapping) and not item  # of K/V to write, say, in a pass that writes none
                if not (empty or isinstance(item, Tensor | bool | int | float | str | None)):
                    raise ValueError(
                        f"block {self.name!r} returns {_describe(item)} at position {position}, which cannot be held "
                        f"over; say with holdover.Slot({self.name!r}, beside=...) what it returns when reused, or "
                        f"attach to a block inside it"
                    )
            return output[at], output[:at] + output[at + 1 :]
        raise ValueError(
            f"block {self.name!r} returns {_describe(output)}; a slot's block returns its hidden state, or a tuple "
            f"with it at position {at}: holdover.Slot({self.name!r}, returns=...)"
        )

    def joined(self, hidden: Tensor, extras: tuple[Any, ...] | None) -> Any:
        """The reverse of `split`."""
        at = self.slot.returns
        return hidden if extras is None else (*extras[:at], hidden, *extras[at:])


def find_blocks(
    model: nn.Module, slots: Sequence[Slot | nn.Module | str] | None, level: Level = "block"
) -> list[Block]:
    """Find a model's blocks, in the order in which it runs them.

    Args:
        model: the model.
        slots: module names, modules or `Slot`s; None asks ``model.holdover_slots()``. A model that does not declare
            itself is taken as it is.
        level: what the policy is attached to where ``slots`` is None.

    Raises:
        ValueError: a block is not part of the model, is named twice or lies within another.
    """
    declare = getattr(model, "holdover_slots", None)
    if slots is None and level == "model":
        slots = _declared(declare, level) or [Slot("", kind="model")]
    elif slots is None:
        if declare is None:
            raise ValueError(
                f"{type(model).__name__} does not declare its blocks; name them: "
                f"attach(model, policy, slots=[f'blocks.{{i}}' for i in range(...)])"
            )
        slots = _declared(declare, level)
        if not slots:
            raise ValueError(
                f"{type(model).__name__} declares no slots of level {level!r}, which this policy asks for; name them: "
                f"attach(model, policy, slots=[holdover.Slot(module, kind=...), ...])"
            )
    if not slots:
        raise ValueError("slots is empty; name at least one block")
    by_name = dict(model.named_modules(remove_duplicate=False))
    names = {id(module): name for name, module in reversed(by_name.items())}
    blocks: list[Block] = []
    for index, given in enumerate(slots):
        slot = given if isinstance(given, Slot) else Slot(given)
        if isinstance(slot.block, str):
            if slot.block not in by_name:
                raise ValueError(f"{type(model).__name__} has no module {slot.block!r}; see model.named_modules()")
            module = by_name[slot.block]
        else:
            module = slot.block
        if id(module) not in names:
            raise ValueError(f"slot {index}, {_describe(module)}, is not part of {type(model).__name__}")
        if not callable(getattr(module, slot.method, None)):
            raise ValueError(f"slot {index}: {type(module).__name__} has no method {slot.method!r}")
        name = (names[id(module)], *([slot.method] if slot.method != "forward" else []))
        blocks.append(Block(index, ".".join(filter(None, name)), module, slot))
    _refuse_overlap(blocks)
    return blocks


def _declared(declare: Callable[[], Sequence[Slot | nn.Module | str]] | None, level: Level) -> list[Slot]:
    """The slots of a level that a model declares."""
    slots = [given if isinstance(given, Slot) else Slot(given) for given in declare()] if declare else []
    return [slot for slot in slots if slot.level == level]


def find_view_groups(model: nn.Module, view_groups: Sequence[ViewGroup] | None) -> tuple[ViewGroup, ...]:
    """The given view groups, else those that ``model.holdover_view_groups()`` declares, else none."""
    if view_groups is None:
        declare = getattr(model, "holdover_view_groups", None)
        view_groups = declare() if declare else ()
    for group in view_groups:
        if not isinstance(group, ViewGroup):
            raise ValueError(f"view_groups holds {group!r}; give holdover.ViewGroup objects")
    return tuple(view_groups)


def _refuse_overlap(blocks: Sequence[Block]) -> None:
    owners: dict[int, list[Block]] = {}
    for block in blocks:
        own = owners.setdefault(id(block.module), [])
        if any(other.slot.method == block.slot.method for other in own):
            raise ValueError(f"slots names {block.name!r} twice; each block has one slot")
        own.append(block)
    for block in blocks:
        if block.slot.method != "forward":
            continue
        for module in block.module.modules():
            for inner in owners.get(id(module), ()):
                if inner is not block:
                    raise ValueError(f"slot {inner.name!r} lies within slot {block.name!r}; name one of them")


def _argument(function: Callable[..., Any], hidden: int | str) -> tuple[int | None, str]:
    """Position and keyword of an argument, as far as the signature tells."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]
    if isinstance(hidden, int):
        if hidden < 0:
            raise ValueError(f"hidden={hidden} is not a position; count arguments from 0, without self")
        return hidden, parameters[hidden] if hidden < len(parameters) else HIDDEN_STATES
    return (parameters.index(hidden) if hidden in parameters else None), hidden


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"

"""Finding the blocks of an unknown model: ``holdover inspect module:function``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from holdover.engine.attach import attach
from holdover.factories import named
from holdover.method import Policy
from holdover.slot import Slot


@dataclass
class Blocks:
    """A list of blocks of one class, and what one forward of the model showed about it.

    Attributes:
        name: of the list, as `named_modules` gives it.
        kind: the class of the blocks.
        count: the number of blocks.
        calls: the numbers of the blocks that ran, in the order in which they ran.
        hidden: the argument that carries the hidden state; None if none fits.
        returns: the position of the hidden state in the tuple that a block returns.
        beside: the types of returned items that a cache cannot return again.
        writes: the arguments whose tensors the blocks change in place.
        trouble: why these blocks cannot be slots; None if they can.
    """

    name: str
    kind: str
    count: int
    calls: list[int] = field(default_factory=list)
    hidden: str | None = None
    returns: int = 0
    beside: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    trouble: str | None = None

    def slots(self) -> list[Slot]:
        assert self.hidden is not None
        return [
            Slot(f"{self.name}.{n}", hidden=self.hidden, returns=self.returns, writes_kv=bool(self.writes))
            for n in range(self.count)
        ]

    def code(self) -> str:
        """The line that attaches to these blocks."""
        fields = [f"hidden={self.hidden!r}"]
        fields += [f"returns={self.returns}"] if self.returns else []
        fields += ["writes_kv=True"] if self.writes else []
        slot = f'holdover.Slot(f"{self.name}.{{n}}", {", ".join(fields)})'
        return f"holdover.attach(model, policy, slots=[{slot} for n in range({self.count})])"

    def declaration(self, model: str) -> str:
        """The adapter, as `holdover.models` declares known models."""
        fields = [f'model="{model}"', 'family="..."', f'blocks=("{self.name}",)', f'hidden="{self.hidden}"']
        fields += [f"returns={self.returns}"] if self.returns else []
        fields += ["writes_kv=True", "autoregressive=True"] if self.writes else []
        return f"Adapter({', '.join(fields)})"


def shapes(given: Sequence[str]) -> dict[str, list[int]]:
    """The shapes of arguments by name, from ``name=1,16,32``; ``name=`` is a number.

    Raises:
        ValueError: one of them is written in another way.
    """
    read = {}
    for each in given:
        name, equals, sizes = each.partition("=")
        if not equals or not all(size.strip().isdigit() for size in sizes.split(",") if sizes):
            raise ValueError(f"{each!r} is no shape; write name=1,16,32, or name= for a number")
        read[name] = [int(size) for size in sizes.split(",") if sizes]
    return read


def build(target: str, shapes: Mapping[str, Sequence[int]]) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model and the arguments of one forward. Arguments of which only the shape is given are random.

    Args:
        target: ``module:function``. The function returns the model, or the model and the arguments, a tuple or mapping.
        shapes: of arguments by name. An argument without dimensions is the number 0.5.

    Raises:
        ValueError: there is no such function, or it returns something else.
    """
    made = named(target)()
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{target} returned a {type(model).__name__}; return a torch.nn.Module, or it and its arguments"
        )
    args = given if isinstance(given, tuple) else ()
    random = torch.Generator().manual_seed(0)
    kwargs = {name: torch.randn(*shape, generator=random) if shape else 0.5 for name, shape in shapes.items()}
    return model.eval(), args, {**(dict(given) if isinstance(given, Mapping) else {}), **kwargs}


@torch.no_grad()
def examine(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], policy: Policy) -> list[Blocks]:
    """Run one forward to see which lists of blocks can be slots. As a test, each of these is then reused once.

    Args:
        model: the model.
        args, kwargs: of its forward.
        policy: reuses every block at the second of two steps.
    """
    found = [
        Blocks(name, type(blocks[0]).__name__, len(blocks))
        for name, blocks in model.named_modules()
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 1 and len({type(block) for block in blocks}) == 1
    ]
    found = [
        each
        for each in found
        if not any(each.name.startswith(f"{other.name}.") for other in found if other is not each)
    ]
    handles = [handle for each in found for handle in _watch(model, each)]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for each in found:
        each.trouble = each.trouble or _trouble(each) or _reused_once(model, each, args, kwargs, policy)
    return found


def describe(model: nn.Module, found: Sequence[Blocks]) -> str:
    """What was found, in words and as lines of code."""
    name = type(model).__name__
    if not found:
        return f"{name} has no list of blocks of one class; name modules as slots: attach(model, policy, slots=[...])"
    lines = []
    for each in found:
        verdict = (
            f"cannot be slots: {each.trouble}" if each.trouble else "work as slots: each was reused once, as a test"
        )
        lines.append(f"{each.name}: {each.count} x {each.kind}, {verdict}")
        if each.writes:
            lines.append(
                f"  writes {', '.join(each.writes)} in place; tell the clean pass its role: "
                f"cache.step(chunk=n, role='kv_update')"
            )
        if not each.trouble:
            lines += ["", f"  {each.code()}", "", f"  {each.declaration(name)}", ""]
    return "\n".join(lines)


def _watch(model: nn.Module, each: Blocks) -> Iterator[Any]:
    """Hooks that note what goes into the blocks of a list, and what comes out."""
    seen: dict[int, tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]] = {}

    def enter(number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told = dict(inspect.signature(block.forward).bind(*args, **kwargs).arguments)
        for parameter in inspect.signature(block.forward).parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                told |= told.pop(parameter.name, {})
        inside = {name: tensor for name, value in told.items() for tensor in _inside(value)}
        seen[number] = told, inside, {name: tensor.clone() for name, tensor in inside.items()}

    def leave(number: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        each.calls.append(number)
        told, inside, before = seen.pop(number)
        items = output if isinstance(output, tuple) else (output,)
        fitting = [
            (name, position)
            for name, value in told.items()
            for position, item in enumerate(items)
            if isinstance(value, Tensor) and isinstance(item, Tensor) and value.dim() > 1 and value.shape == item.shape
        ]
        if fitting and each.hidden is None:
            each.hidden, each.returns = fitting[0]
        each.beside = [
            type(item).__name__ for item in items if not isinstance(item, Tensor | bool | int | float | str | None)
        ]
        changed = [name for name, tensor in inside.items() if not torch.equal(tensor, before[name])]
        each.writes += [name for name in changed if name not in each.writes]

    for number, block in enumerate(model.get_submodule(each.name).children()):
        yield block.register_forward_pre_hook(lambda b, a, k, n=number: enter(n, b, a, k), with_kwargs=True)
        yield block.register_forward_hook(lambda b, a, o, n=number: leave(n, b, a, o))


def _inside(value: Any) -> Iterator[Tensor]:
    """Tensors in the dictionaries and lists of an argument: a KV cache is one."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from [item] if isinstance(item, Tensor) else _inside(item)


def _trouble(each: Blocks) -> str | None:
    if not each.calls:
        return "never ran"
    if each.calls != list(range(each.count)):
        return f"ran in the order {each.calls}; every block must run once, in the order of the list"
    if each.hidden is None:
        return "no argument has the shape of a returned tensor"
    if each.beside:
        return f"returns a {each.beside[0]}, too; say with Slot(beside=...) what a reused block returns in its place"
    return None


def _reused_once(
    model: nn.Module, each: Blocks, args: tuple[Any, ...], kwargs: dict[str, Any], policy: Policy
) -> str | None:
    """Computes the blocks once and reuses them once, with the same input: why that fails, or None."""
    try:
        with attach(model, policy, slots=each.slots()) as cache:
            for index in range(2):
                with cache.step(chunk=0, index=index, num_steps=2, commits=False):
                    model(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None if cache.stats().reused == each.count else "was not reused"

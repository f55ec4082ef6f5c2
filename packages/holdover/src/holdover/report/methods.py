"""The registered methods as tables, read off the policies themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from rich.table import Table

from holdover.engine.contract import Guard
from holdover.methods.parts.guards import AnyOf
from holdover.methods.registry import method, policies

#: Options without which a method cannot be made, here of no meaning.
CALIBRATED = {"magcache": {"ratios": (1.0,)}}
COLUMNS = ("method", "axis", "span", "signal", "gate", "predictor", "guards", "source")


def method_rows() -> Iterator[tuple[str, ...]]:
    """Per method, with its default options, the parts that it is composed of, under `COLUMNS`."""
    for name in policies():
        policy = method(name)(**CALIBRATED.get(name, {}))
        guards: tuple[Guard, ...] = policy.guard.guards if isinstance(policy.guard, AnyOf) else (policy.guard,)
        source, _, _ = (inspect.getdoc(inspect.getmodule(method(name))) or "").partition(":")
        yield (
            name,
            "chunks" if policy.lifetime == "stream" else "steps",
            {"model": "the whole model", "sublayer": "attention and MLPs"}.get(policy.level, repr(policy.spans)),
            repr(policy.signal) if policy.signal else "–",
            repr(policy.gate),
            repr(policy.predictor) if policy.predictor else "–",
            " or ".join(map(repr, guards)) or "–",
            source.strip() if "(" in source else "–",
        )


def method_table() -> Table:
    """For a terminal."""
    table = Table("method", "made of", show_lines=True)
    for name, *parts in method_rows():
        table.add_row(
            name, "\n".join(f"{c}: {part}" for c, part in zip(COLUMNS[1:], parts, strict=True) if part != "–")
        )
    return table


def method_markdown() -> str:
    """For the documentation."""
    lines: list[tuple[str, ...]] = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, axis, *parts, source in method_rows():
        lines.append((f"`{name}`", axis, *(f"`{part}`" if "(" in part else part for part in parts), source))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def method_help(name: str) -> str:
    """A method's options, as its docstring tells them.

    Raises:
        ValueError: there is no such method.
    """
    function = method(name)
    options = [str(p.replace(annotation=p.empty)) for p in inspect.signature(function).parameters.values()]
    return f"{name}({', '.join(options)})\n\n{inspect.getdoc(function)}"

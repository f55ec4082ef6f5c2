"""The registered methods as tables, made from the policies themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from rich.table import Table

from holdover.method import Trigger
from holdover.methods.light_interaction import CameraOverlap
from holdover.methods.parts.guards import AnyOf
from holdover.methods.registry import method, policies, presets

#: Options without which a method cannot be made. Their values do not matter here.
CALIBRATED: Mapping[str, Mapping[str, Any]] = {
    "magcache": {"ratios": (1.0,)},
    "light_interaction": {"familiar": CameraOverlap},
}
COLUMNS = ("method", "axis", "span", "signal", "trigger", "predictor", "guards", "source")


def method_rows() -> Iterator[tuple[str, ...]]:
    """The parts of each method with its default options, in the order of `COLUMNS`."""
    for name in policies():
        policy = method(name)(**CALIBRATED.get(name, {}))
        trigger = policy.trigger
        guards = trigger.guard.guards if isinstance(trigger.guard, AnyOf) else (trigger.guard,)
        source, _, _ = (inspect.getdoc(inspect.getmodule(method(name))) or "").partition(":")
        yield (
            name,
            "chunks" if policy.lifetime == "stream" else "steps",
            {"model": "the whole model", "sublayer": "attention and MLPs"}.get(policy.level, repr(policy.spans)),
            repr(trigger.signal) if trigger.signal else "–",
            _options(trigger),
            repr(policy.predictor) if policy.predictor else "–",
            " or ".join(map(repr, guards)) or "–",
            source.strip() if "(" in source else "–",
        )


def _options(trigger: Trigger) -> str:
    """A trigger as its repr has it, without guard and signal, which have columns of their own."""
    own = [field.name for field in fields(trigger) if field.repr and field.name not in ("guard", "signal")]
    return f"{type(trigger).__name__}({', '.join(f'{name}={getattr(trigger, name)!r}' for name in own)})"


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
    """The options of a method, from its docstring, and its presets.

    Raises:
        ValueError: there is no such method.
    """
    function = method(name)
    options = [str(p.replace(annotation=p.empty)) for p in inspect.signature(function).parameters.values()]
    told = f"{name}({', '.join(options)})\n\n{inspect.getdoc(function)}"
    if presets(name):
        told += "\n\nPresets:"
    for preset, values in presets(name).items():
        told += f"\n    {preset}: {', '.join(f'{option}={value!r}' for option, value in values.items())}"
    return told

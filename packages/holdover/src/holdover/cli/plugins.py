"""Commands of other packages: entry points of the group ``holdover.commands``."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from holdover.cli.common import fail

GROUP = "holdover.commands"


class Commands(TyperGroup):
    """The library's commands, and after them those of other packages, which are imported when they are asked for.

    An entry point names a `typer.Typer` or a function. One that cannot be imported says so when it is called; the other
    commands work.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return [*own, *sorted({point.name for point in entry_points(group=GROUP)} - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        points = [] if command else [*entry_points(group=GROUP, name=cmd_name)]
        return _load(points[0]) if points else command


def _load(point: EntryPoint) -> Any:
    """The command of an entry point."""
    within = typer.Typer(rich_markup_mode=None)
    try:
        made = point.load()
    except Exception as error:  # whatever another package does wrong
        within.command(point.name, **_BROKEN)(_broken(point, error))
    else:
        if isinstance(made, typer.Typer):
            within.add_typer(made, name=point.name)
        else:
            within.command(point.name)(made)
    return typer.main.get_group(within).commands[point.name]


#: Such a command takes whatever it is given, ``--help`` too.
_BROKEN: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "help": "Cannot be imported; call it to see why.",
}


def _broken(point: EntryPoint, error: Exception) -> Any:
    package = point.dist.name if point.dist else point.value
    message = f"the command {point.name!r} of {package} cannot be imported: {type(error).__name__}: {error}"

    def command() -> None:
        fail(message)

    return command

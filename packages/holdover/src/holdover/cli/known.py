"""What the library knows: `holdover methods`, `holdover models`, `holdover inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from holdover.cli.common import plain_errors


def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this method and its options.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the documentation.")] = False,
) -> None:
    """List the caching methods and their parts."""
    with plain_errors():
        from rich.console import Console

        from holdover.report.methods import method_help, method_markdown, method_table

        if name is not None:
            typer.echo(method_help(name))
        elif markdown:
            typer.echo(method_markdown())
        else:
            Console().print(method_table())


def models() -> None:
    """List the models whose blocks are known, as a Markdown table."""
    with plain_errors():
        from holdover.models.registry import models_markdown

        typer.echo(models_markdown(), nl=False)


def inspect(
    target: Annotated[
        str,
        typer.Argument(help="module:function. The function returns a model, or a model and the arguments of a pass."),
    ],
    shape: Annotated[
        list[str] | None,
        typer.Option(help="The shape of an argument whose values are random, such as name=1,16,3,32,32."),
    ] = None,
) -> None:
    """Find the blocks of an unknown model.

    Prints the lines that attach a cache to them.
    """
    with plain_errors():
        from holdover.methods.fixed_interval import fixed_interval
        from holdover.models.inspect import build, describe, examine, shapes

        policy = fixed_interval(over="steps", every=2, front_anchors=0, warmup=0, protection="pass")
        model, args, kwargs = build(target, shapes(shape or []))
        typer.echo(describe(model, examine(model, args, kwargs, policy)))

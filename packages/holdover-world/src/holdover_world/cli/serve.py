"""`holdover serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdover.cli.common import plain_errors
from holdover_world.cli.common import Model, load


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on. Others than localhost need --tokens.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8000,
    tokens: Annotated[Path | None, typer.Option(help="A file of bearer tokens, one per line.")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Offer this policy. Can be repeated; the first is the default.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="The folder for idle sessions and snapshots.")] = Path("runs/serve"),
    sessions: Annotated[int, typer.Option(help="The limit on sessions of all users.")] = 64,
    max_bytes: Annotated[int, typer.Option(help="The limit on sessions and snapshots in memory.")] = 4 * 2**30,
    durable: Annotated[bool, typer.Option(help="Write each session to disk after every chunk.")] = False,
    model: Model = None,
) -> None:
    """Serve the world model. Sessions run over HTTP and WebSocket, and there is a page to drive on."""
    with plain_errors():
        import holdover
        from holdover_world.server.access import read_tokens
        from holdover_world.server.seats import Limits
        from holdover_world.server.server import check_address
        from holdover_world.server.server import serve as run
        from holdover_world.sessions.world import World, load_starts

        chosen = {name: holdover.policy(name) for name in policy} if policy else None
        limits = Limits(sessions=sessions, max_bytes=max_bytes)
        known = read_tokens(tokens) if tokens else None
        check_address(host, port, known)
        loaded = load(model)[0]
        world = World(loaded, load_starts(loaded), policies=chosen)
        run(world, host=host, port=port, tokens=known, limits=limits, folder=folder, durable=durable)

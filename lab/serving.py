"""Throughput and action-to-frame latency of `holdover serve`, with and without X-Cache, for 1 to 16 sessions.

The server of the shipped model runs in a process of its own. Its clients drive steadily through town, and send the next
action as soon as they have a chunk. Policies take turns at every number of sessions. Writes ``serving.md`` and
``serving.json``.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import msgpack
import numpy as np
import typer
from websockets.asyncio.client import connect

from holdover.report.environment import environment
from holdover.report.tables import markdown
from holdover_world.cli.common import show
from holdover_world.loop.scenarios import load_scenario, shipped_model
from holdover_world.measure.cards import about, write_card
from holdover_world.model.transformer import WorldModel
from lab.cards import LAB, Out, run_script

POLICIES = ("never", "xcache_reactive", "xcache")
#: The first chunks of a session are not counted: its first cycle computes everything.
WARM_UP = 4


async def client(address: str, policy: str, action: list[float], chunks: int) -> list[tuple[float, float]]:
    """One session: when each action was sent and when its frames arrived, without the warm-up."""
    times = []
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=600) as http:
        new = {"scenario": "urban", "policy": policy}
        id = (await http.post("/v1/sessions", json=new)).raise_for_status().json()["id"]
        url = f"ws://{address}/v1/sessions/{id}/stream"
        async with connect(url, max_size=None, ping_timeout=None) as ws:
            await ws.recv()
            for n in range(WARM_UP + chunks):
                sent = time.perf_counter()
                await ws.send(msgpack.packb({"type": "action", "seq": n, "action": action}))
                made = msgpack.unpackb(await ws.recv())
                if made["type"] != "chunk":
                    raise RuntimeError(made["detail"])
                times.append((sent, time.perf_counter()))
                await ws.send(msgpack.packb({"type": "ack", "chunk": n}))
        (await http.delete(f"/v1/sessions/{id}")).raise_for_status()
    return times[WARM_UP:]


async def together(address: str, policy: str, action: list[float], sessions: int, chunks: int) -> dict[str, Any]:
    """Several sessions at once: their throughput and latency."""
    runs = await asyncio.gather(*(client(address, policy, action, chunks) for _ in range(sessions)))
    times = np.array([pair for run in runs for pair in run])
    latency = 1e3 * (times[:, 1] - times[:, 0])
    return {
        "policy": policy,
        "sessions": sessions,
        "chunks_per_second": len(times) / float(times[:, 1].max() - times[:, 0].min()),
        "latency_ms_p50": float(np.percentile(latency, 50)),
        "latency_ms_p95": float(np.percentile(latency, 95)),
    }


@contextmanager
def serve(policies: Sequence[str]) -> Iterator[str]:
    """Run a server of the shipped model and yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        offered = itertools.chain.from_iterable(("--policy", policy) for policy in policies)
        arguments = ["serve", "--port", address.partition(":")[2], "--folder", folder, *offered]
        server = subprocess.Popen([sys.executable, "-m", "holdover", *arguments], stderr=subprocess.DEVNULL)
        try:
            while server.poll() is None:
                try:
                    httpx.get(f"http://{address}/healthz").raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield address
        finally:
            server.terminate()
            server.wait()


def card(figures: dict[str, Any]) -> str:
    """The Markdown of a result."""
    columns = "sessions", "policy", "chunks per second, together", "latency, ms: median", "95th percentile"
    rows = [
        (
            str(row["sessions"]),
            f"`{row['policy']}`",
            f"{row['chunks_per_second']:.2f}",
            f"{row['latency_ms_p50']:.0f}",
            f"{row['latency_ms_p95']:.0f}",
        )
        for row in figures["rows"]
    ]
    return f"""# Serving

`python -m lab.serving`: clients in lockstep on steady urban driving, {figures["chunks"]} chunks each after {WARM_UP} of
warm-up. Latency is from sending an action to the arrival of its frames.

{markdown(columns, rows)}
{about(figures["on"])}
"""


def main(
    out: Out = LAB,
    chunks: Annotated[int, typer.Option(help="Per session, after the warm-up.")] = 24,
    sessions: Annotated[
        list[int] | None, typer.Option(help="At once; again for more. Default: 1, 2, 4, 8, 16.")
    ] = None,
) -> None:
    """Throughput and action-to-frame latency of `holdover serve`, with and without X-Cache."""
    model = WorldModel.load(shipped_model())
    action = [float(value) for value in load_scenario("urban-steady", model, chunks=1).actions[0]]
    with serve(POLICIES) as address:
        rows = [
            asyncio.run(together(address, policy, action, count, chunks))
            for count in sessions or (1, 2, 4, 8, 16)
            for policy in POLICIES
        ]
    figures = {"chunks": chunks, "rows": rows, "on": environment(model, shipped_model())}
    write_card(out, "serving", card(figures), figures)
    show(out / "serving.md", figures)


if __name__ == "__main__":
    run_script(main)

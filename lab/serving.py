"""Throughput and action-to-frame latency of `holdover serve`, with and without X-Cache, for 1 to 16 sessions.

    python benchmarks/serving.py

A server of the shipped model in a process of its own; clients in lockstep on steady urban driving, who send the next
action as soon as they have a chunk. Policies take turns at every number of sessions. Writes ``serving.md`` and
``serving.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
from websockets.asyncio.client import connect

from holdover_world.loop.scenarios import load_scenario, shipped_model
from holdover_world.measure.measure import environment
from holdover_world.model.transformer import WorldModel
from lab.cards import about, write_card

POLICIES = ("never", "xcache_reactive", "xcache")
#: Chunks per session that are not counted: the first cycle, which computes everything.
WARM_UP = 4


async def client(address: str, policy: str, action: list[float], chunks: int) -> list[tuple[float, float]]:
    """When each action was sent and when its frames had come, warm-up left out."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--chunks", type=int, default=24, help="per session, after the warm-up")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    options = parser.parse_args()
    model = WorldModel.load(shipped_model())
    action = [float(value) for value in load_scenario("urban-steady", model, chunks=1).actions[0]]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        offered = itertools.chain.from_iterable(("--policy", policy) for policy in POLICIES)
        arguments = ["serve", "--port", address.partition(":")[2], "--folder", folder, *offered]
        server = subprocess.Popen([sys.executable, "-m", "holdover", *arguments], stderr=subprocess.DEVNULL)
        try:
            while server.poll() is None:
                try:
                    httpx.get(f"http://{address}/healthz").raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            rows = [
                asyncio.run(together(address, policy, action, sessions, options.chunks))
                for sessions in options.sessions
                for policy in POLICIES
            ]
        finally:
            server.terminate()
            server.wait()
    table = "\n".join(
        f"| {row['sessions']} | `{row['policy']}` | {row['chunks_per_second']:.2f} | "
        f"{row['latency_ms_p50']:.0f} | {row['latency_ms_p95']:.0f} |"
        for row in rows
    )
    surroundings = environment(model, shipped_model())
    text = (
        "# Serving\n\n"
        f"`python benchmarks/serving.py`: lockstep clients on steady urban driving, {options.chunks} chunks "
        f"each after {WARM_UP} of warm-up. From an action's sending to its frames' arrival.\n\n"
        "| sessions | policy | chunks per second, together | latency, ms: median | 95th percentile |\n"
        f"| --: | :-- | --: | --: | --: |\n{table}\n\n{about(surroundings)}\n"
    )
    figures = {"chunks": options.chunks, "rows": rows, "on": surroundings}
    write_card(options.out, "serving", text, figures)
    print(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

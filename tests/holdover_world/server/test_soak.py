"""Sixteen restless clients: no cross-talk, no chunk lost or repeated, nothing left behind.

``HOLDOVER_SOAK_SECONDS`` makes it last longer.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed

from tests.holdover_world.server.live import Live, Stream, running
from tests.holdover_world.server.test_server import near, solo
from tests.holdover_world.sessions.small import action

SECONDS = float(os.environ.get("HOLDOVER_SOAK_SECONDS", "4"))
CLIENTS, SEEDS, LENGTH = 16, 6, 16


class Client:
    """Drives one session after another, and loses its connection now and then."""

    def __init__(self, live: Live, number: int, expected: list[list[Any]]) -> None:
        self.live, self.expected = live, expected
        self.random, self.did = random.Random(number), Counter[str]()

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            seed = self.random.randrange(SEEDS)
            id = self.live.create(seed=seed)
            at = self.drive(id, seed, 0, self.random.randint(1, LENGTH // 2))
            if self.random.random() < 0.4:
                fork = self.live.http.post(f"/v1/sessions/{id}/fork").json()["id"]
                self.did["forks"] += 1
                self.drive(fork, seed, at, self.random.randint(at, LENGTH))
                assert self.live.http.delete(f"/v1/sessions/{fork}").status_code == 204
            self.drive(id, seed, at, self.random.randint(at, LENGTH))
            assert self.live.http.delete(f"/v1/sessions/{id}").status_code == 204
            self.did["sessions"] += 1

    def drive(self, id: str, seed: int, first: int, last: int) -> int:
        """Chunks from the first up to the last, each of which must come exactly once."""
        at = first
        while at < last:
            query = f"?after={at - 1}" if at else ""
            try:
                with self.live.stream(id, query) as stream:
                    while at < last:
                        self.step(stream, seed, at)
                        at += 1
                        if self.random.random() < 0.05:
                            self.did["disconnects"] += 1
                            break
            except (ConnectionClosed, OSError, EOFError):
                self.did["kills"] += 1
        return at

    def step(self, stream: Stream, seed: int, at: int) -> None:
        if stream.hello["seq"] < at:  # else it was sent before the connection broke
            stream.send(type="action", seq=at, action=action(at, seed))
        if self.random.random() < 0.05:
            stream.ws.socket.shutdown(socket.SHUT_RDWR)
        made = stream.receive()
        assert (made["type"], made["index"], made["seq"]) == ("chunk", at, at), made
        assert near(made, self.expected[seed][at])
        stream.send(type="ack", chunk=at)
        self.did["chunks"] += 1


def test_sixteen_restless_clients(tmp_path: Path) -> None:
    expected = [solo(seed, LENGTH) for seed in range(SEEDS)]
    with running(tmp_path, sessions_per_owner=64) as live:
        clients = [Client(live, n, expected) for n in range(CLIENTS)]
        failures: list[BaseException] = []

        def run(client: Client) -> None:
            try:
                client.run(time.monotonic() + SECONDS)
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=run, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        did = sum((client.did for client in clients), Counter[str]())
        assert did["chunks"] > 0
        assert live.sessions() == []
        metrics, world = live.metrics(), live.hub.world
        assert metrics["holdover_bytes"] == 0
        assert not list(tmp_path.iterdir())
        for policy in world.policies:
            cache = world.attached(policy).cache
            assert (cache.nbytes, len(cache.trace)) == (0, 0)
            assert cache.stats(str(4 * CLIENTS)).computed == 0  # names of streams are reused: this one never ran
        sessions, batches = metrics["holdover_batch_sessions_sum"], metrics["holdover_batch_sessions_count"]
        assert sessions > batches
        print(dict(did), f"{sessions / batches:.1f} sessions in a batch")

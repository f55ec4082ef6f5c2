"""A server that is killed outright loses at most the chunk in flight."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from holdover_world.server.server import ThisThread
from tests.holdover_world.server.live import Live
from tests.holdover_world.server.test_server import drive, near, solo
from tests.holdover_world.sessions.small import action

SERVER = """
import json, sys, threading
from pathlib import Path
from holdover_world.server.server import serve
from tests.holdover_world.sessions.small import small_world
world, threads = small_world(), set()
world.model.register_forward_pre_hook(lambda *_: threads.add(threading.current_thread().name))
serve(world, port=int(sys.argv[1]), folder=Path(sys.argv[2]), durable=True)
print(json.dumps({"event": "served", "on": sorted(threads)}), file=sys.stderr)
"""


def start(port: int, folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port), str(folder)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200:
                return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the server did not start: {process.communicate()[1]}")


def test_sessions_of_a_killed_server_continue(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    first = start(port, tmp_path)
    live = Live(None, port, None)  # type: ignore[arg-type]
    with live.http:
        id = live.create(seed=8)
        with live.stream(id) as stream:
            made = drive(stream, 8, 0, 3)
            stream.send(type="action", seq=3, action=action(3, 8))
            first.kill()
        first.communicate()
    second = start(port, tmp_path)
    live = Live(None, port, None)  # type: ignore[arg-type]
    with live.http, live.stream(id, "?after=2") as stream:
        if stream.hello["seq"] == 3:  # the chunk was done and waits
            made.append(stream.receive())
            stream.send(type="ack", chunk=3)
        made += drive(stream, 8, len(made), 6 - len(made))
    assert [each["index"] for each in made] == list(range(6))
    assert all(near(*pair) for pair in zip(made, solo(8, 6), strict=True))
    second.send_signal(signal.SIGTERM)
    log = [json.loads(line) for line in second.communicate(timeout=120)[1].splitlines()]
    assert "drained" in [line["event"] for line in log]
    assert not any("traceback" in line for line in log)
    assert log[-1] == {"event": "served", "on": ["MainThread"]}
    assert second.returncode == 0


def test_work_is_done_by_the_thread_that_runs_it() -> None:
    this, asked = ThisThread(), list[Future[str]]()

    def ask() -> None:
        asked.append(this.submit(lambda: threading.current_thread().name))
        asked.append(this.submit(str, b"x", "no such encoding"))
        this.shutdown()

    asking = threading.Thread(target=ask)
    asking.start()
    this.run()
    asking.join()
    assert asked[0].result(timeout=0) == threading.current_thread().name
    assert isinstance(asked[1].exception(timeout=0), LookupError)
    with pytest.raises(RuntimeError, match="shutting down"):
        this.submit(str)


def test_a_server_whose_port_is_taken_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = [sys.executable, "-c", SERVER, str(taken.getsockname()[1]), str(tmp_path)]
        ended = subprocess.run(arguments, stderr=subprocess.PIPE, text=True, timeout=240, check=False)
    assert ended.returncode not in (0, -signal.SIGKILL)
    assert "Address already in use" in ended.stderr

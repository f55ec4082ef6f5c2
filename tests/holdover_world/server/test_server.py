"""The server over a real socket: each session gets the video that it would get alone, whatever others do."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus

from holdover_world.sessions.session import WorldSession
from tests.holdover_world.server.live import Live, Stream, running
from tests.holdover_world.sessions.small import action, small_world


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("live"), sessions_per_owner=64) as server:
        yield server


def solo(seed: int, count: int, scenario: str = "town") -> list[dict[str, NDArray[np.uint8]]]:
    with WorldSession(small_world()) as session:
        session.reset(scenario, seed)
        return [dict(session.step(action(n, seed)).frames) for n in range(count)]


def pixels(made: dict[str, Any]) -> dict[str, NDArray[np.uint8]]:
    return {
        camera: np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in frames])
        for camera, frames in made["frames"].items()
    }


def near(made: dict[str, Any], expected: dict[str, NDArray[np.uint8]]) -> bool:
    """Equal up to rounding. The frames of other sessions differ by 25 or more."""
    shown = pixels(made)
    return all(np.abs(shown[camera].astype(int) - expected[camera]).mean() < 0.05 for camera in expected)


def drive(stream: Stream, seed: int, first: int, count: int) -> list[dict[str, Any]]:
    return [stream.step(n, action(n, seed)) for n in range(first, first + count)]


def test_a_stream_gives_what_a_session_gives(live: Live) -> None:
    id = live.create(scenario="coast", seed=5)
    with live.stream(id) as stream:
        assert stream.hello["resumes_at"] == 0
        assert stream.hello["cameras"] == {"front_wide": [48, 32], "front_narrow": [48, 32], "rear": [16, 16]}
        made = drive(stream, 5, 0, 5)
    assert [each["index"] for each in made] == [each["seq"] for each in made] == list(range(5))
    assert all(near(*pair) for pair in zip(made, solo(5, 5, "coast"), strict=True))
    grid = made[1]["decisions"]
    assert np.array(grid["grid"]).shape == (4, 4)
    assert made[0]["latency_ms"] > 0
    info = live.info(id)
    assert (info["chunk"], info["seconds"]) == (5, pytest.approx(5 * 4 / 12))
    assert live.http.delete(f"/v1/sessions/{id}").status_code == 204
    assert live.http.get(f"/v1/sessions/{id}").status_code == 404


@contextmanager
def hearing(live: Live) -> Iterator[list[Any]]:
    """What the frames of each window are told, chunk by chunk."""
    heard: list[Any] = []

    def note(_model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["sigma"] == 1:
            heard.append(kwargs["action_BFA"][0].tolist())

    hook = live.hub.world.attached("eager").model.register_forward_pre_hook(note, with_kwargs=True)
    yield heard
    hook.remove()


def test_an_action_may_bring_a_plan(live: Live) -> None:
    a, b = [0.5, 0.25], [1.0, -0.25]
    with WorldSession(small_world()) as session:
        session.reset("town", 3)
        expected = [session.step(*told).frames for told in ((a, [b]), (b, None), (a, None))]
    with live.stream(live.create(seed=3)) as stream, hearing(live) as heard:
        made = []
        for seq, (command, plan) in enumerate(((a, [b, a]), (b, None), (a, []))):
            stream.send(type="action", seq=seq, action=command, plan=plan)
            made.append(stream.receive())
        assert all(near(*pair) for pair in zip(made, expected, strict=True))
        assert heard == [[a, b], [a, b], [a, a]]
        for wrong, detail in (
            ([[0.1]], "plan[0] has 1 numbers; give 2"),
            ([[0.1, 2.0]], "action.plan.0.1: Input should be less than or equal to 1"),
            ([[0.1, float("nan")]], "action.plan.0.1: Input should be"),
            (0.5, "action.plan: Input should be a valid list"),
            ([[0.1, 0.2]] * 17, "action.plan: List should have at most 16 items"),
        ):
            stream.send(type="action", seq=9, action=a, plan=wrong)
            refused = stream.receive()
            assert (refused["code"], refused["detail"][: len(detail)]) == ("invalid", detail)


def test_a_plan_is_for_one_chunk(live: Live) -> None:
    """In real time the next chunk comes without a new action; then the newest is held."""
    with live.stream(live.create(mode="realtime")) as stream, hearing(live) as heard:
        stream.send(type="action", seq=0, action=[0.5, 0.25], plan=[[1.0, -0.25]])
        for n in range(3):
            assert stream.receive()["index"] == n
            stream.send(type="ack", chunk=n)
    assert heard[:3] == [[[0.5, 0.25], [1.0, -0.25]], [[0.5, 0.25]] * 2, [[0.5, 0.25]] * 2]


def test_late_and_duplicate_actions_are_ignored(live: Live) -> None:
    with live.stream(live.create()) as stream:
        stream.step(5, [0.5, 0.0])
        for seq in (5, 3):
            stream.send(type="action", seq=seq, action=[0.9, 0.9])
            refused = stream.receive()
            assert (refused["type"], refused["code"]) == ("error", "stale")
            assert refused["detail"] == f"action {seq} is not newer than the newest, 5; it is ignored"
        assert stream.step(6, [0.5, 0.0])["index"] == 1


def test_a_session_waits_for_a_slow_reader_and_then_uses_the_newest_action(live: Live) -> None:
    with live.stream(live.create()) as stream:
        made = [stream.step(n, [0.1, 0.0], ack=False) for n in range(4)]
        for seq in range(4, 12):  # these wait, because nothing was acknowledged, and each replaces the one before
            stream.send(type="action", seq=seq, action=[0.2, 0.0])
        with pytest.raises(TimeoutError):
            stream.receive(timeout=0.5)
        stream.send(type="ack", chunk=made[-1]["index"])
        newest = stream.receive()
        assert (newest["index"], newest["seq"]) == (4, 11)


def test_a_broken_connection_resumes_with_nothing_lost_or_repeated(live: Live) -> None:
    id = live.create(seed=2)
    with live.stream(id) as stream:
        stream.step(0, action(0, 2))
        missed = [stream.step(n, action(n, 2), ack=False) for n in (1, 2)]
    with live.stream(id, "?after=0") as stream:
        assert (stream.hello["resumes_at"], stream.hello["seq"]) == (1, 2)
        assert [stream.receive(), stream.receive()] == missed
        rest = drive(stream, 2, 3, 2)
    assert all(near(*pair) for pair in zip(rest, solo(2, 5)[3:], strict=True))
    with pytest.raises(InvalidStatus, match="422"), live.stream(id, "?after=99"):
        pass


def test_a_new_connection_takes_over(live: Live) -> None:
    id = live.create()
    with live.stream(id) as old, live.stream(id) as new:
        with pytest.raises(ConnectionClosed) as closed:
            old.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4409
        assert new.step(0, [0.0, 0.0])["index"] == 0


def test_a_deleted_session_ends_its_connection(live: Live) -> None:
    id = live.create()
    with live.stream(id) as stream:
        assert live.http.delete(f"/v1/sessions/{id}").status_code == 204
        with pytest.raises(ConnectionClosed) as closed:
            stream.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4404


def test_a_session_whose_file_is_gone_fails_alone(tmp_path: Path) -> None:
    with running(tmp_path, park_after=0.1) as live:
        lost, other = live.create(), live.create(seed=3)
        deadline = time.monotonic() + 30
        while not all(session["parked"] for session in live.sessions()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (tmp_path / f"session-{lost}.safetensors").unlink()
        with live.stream(lost) as stream, live.stream(other) as bystander:
            stream.send(type="action", seq=0, action=[0.0, 0.0])
            assert stream.receive()["code"] == "failed"
            assert all(near(*pair) for pair in zip(drive(bystander, 3, 0, 3), solo(3, 3), strict=True))


def test_many_sessions_share_passes_and_nothing_else(live: Live) -> None:
    results: dict[int, list[dict[str, Any]]] = {}

    def client(seed: int) -> None:
        id, made = live.create(seed=seed), []
        with live.stream(id) as stream:
            made += drive(stream, seed, 0, 3)
        if seed % 2:  # others lose their connection half-way
            time.sleep(0.05)
        with live.stream(id, "?after=2") as stream:
            made += drive(stream, seed, 3, 3)
        results[seed] = made

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(6):
        assert [each["index"] for each in results[seed]] == list(range(6))
        assert all(near(*pair) for pair in zip(results[seed], solo(seed, 6), strict=True))
    assert max(each["batch"] for made in results.values() for each in made) > 1


def test_forks_and_snapshots_continue_from_their_session(live: Live) -> None:
    id = live.create(seed=3)
    with live.stream(id) as stream:
        drive(stream, 3, 0, 3)
    fork = live.http.post(f"/v1/sessions/{id}/fork").json()["id"]
    stored = live.http.post(f"/v1/sessions/{id}/snapshots").json()
    assert stored["chunk"] == 3
    with live.stream(id) as stream:
        expected = [pixels(each) for each in drive(stream, 3, 3, 3)]
    restored = live.http.post(f"/v1/snapshots/{stored['id']}/restore").json()["id"]
    for other in (fork, restored):
        with live.stream(other) as stream:
            assert stream.hello["resumes_at"] == 3
            assert all(near(*pair) for pair in zip(drive(stream, 3, 3, 3), expected, strict=True))
    assert [each["id"] for each in live.http.get("/v1/snapshots").json()] == [stored["id"]]
    assert live.http.delete(f"/v1/snapshots/{stored['id']}").status_code == 204
    assert live.http.post(f"/v1/snapshots/{stored['id']}/restore").status_code == 404


def test_the_policy_is_switched_live(live: Live) -> None:
    with live.stream(live.create()) as stream:
        made = [stream.step(n, [0.5, 0.0]) for n in range(2)]
        assert "reuse" in made[1]["decisions"]["reasons"]
        stream.send(type="policy", policy="never")
        made = [stream.step(n, [0.5, 0.0]) for n in range(2, 4)]
        assert [each["policy"] for each in made] == ["never"] * 2
        assert made[1]["decisions"]["reasons"] == ["never"]
        stream.send(type="policy", policy="turbo")
        assert "'turbo' is not one of eager, never" in stream.receive()["detail"]


def test_real_time_continues_under_the_newest_action(live: Live) -> None:
    with live.stream(live.create(mode="realtime")) as stream:
        made = [stream.step(7, [0.5, 0.0])]
        for _ in range(3):
            made.append(stream.receive())
            stream.send(type="ack", chunk=made[-1]["index"])
        assert [each["index"] for each in made] == [0, 1, 2, 3]
        assert {each["seq"] for each in made} == {7}


def test_a_chunk_that_fails_is_reported_and_leaves_the_session_unchanged(live: Live) -> None:
    block = live.hub.world.attached("never").model.blocks[2]
    with live.stream(live.create(seed=1, policy="never")) as stream:
        made = drive(stream, 1, 0, 3)
        inner, block.norm2.forward = block.norm2.forward, lambda _: 1 / 0
        stream.send(type="action", seq=3, action=action(3, 1))
        failed = stream.receive()
        block.norm2.forward = inner
        assert (failed["code"], "unchanged" in failed["detail"]) == ("failed", True)
        made += [stream.step(n + 1, action(n, 1)) for n in (3, 4)]
        assert [each["index"] for each in made] == list(range(5))
    with WorldSession(small_world(), policy="never") as session:
        session.reset("town", 1)
        assert all(near(each, dict(session.step(action(n, 1)).frames)) for n, each in enumerate(made))


def test_hostile_messages_get_an_error_and_affect_no_other_session(live: Live) -> None:
    hostile = [
        b"", b"\xc1", b"\x93", msgpack.packb([1, 2]), msgpack.packb({1: 2}), b"\x81" * 3000, b"\xdf\xff\xff\xff\xff",
        msgpack.packb({"type": "action", "seq": 0, "action": [float("nan"), 0.0]}),
        msgpack.packb({"type": "action", "seq": 0, "action": [float("inf"), 0.0]}),
        msgpack.packb({"type": "action", "seq": 0, "action": [1e300, 0.0]}),
        msgpack.packb({"type": "action", "seq": 0, "action": [0.0]}),
        msgpack.packb({"type": "action", "seq": -1, "action": [0.0, 0.0]}),
        msgpack.packb({"type": "action", "seq": 2**60, "action": [0.0, 0.0]}),
        msgpack.packb({"type": "action", "seq": True, "action": [0.0, 0.0]}),
        msgpack.packb({"type": "ack", "chunk": 10**6}),
        msgpack.packb({"type": "../../etc/passwd"}),
        msgpack.packb({"type": "policy", "policy": "x" * 60}),
    ]  # fmt: skip
    with live.stream(live.create(seed=1)) as bystander, live.stream(live.create()) as stream:
        made = drive(bystander, 1, 0, 2)
        for message in hostile:
            stream.ws.send(message)
            assert stream.receive()["code"] == "invalid", message
        stream.ws.send("text")
        assert "binary" in stream.receive()["detail"]
        assert stream.step(0, [0.0, 0.0])["index"] == 0
        stream.ws.send(b"x" * 20_000)
        with pytest.raises(ConnectionClosed):
            stream.receive()
        made += drive(bystander, 1, 2, 2)
    assert all(near(*pair) for pair in zip(made, solo(1, 4), strict=True))


def test_hostile_requests_get_an_error(live: Live) -> None:
    post = live.http.post
    for content, status in (
        (b"{", 422),
        (b'{"seed": NaN}', 422),
        (b'{"seed": 1e400}', 422),
        (b'{"scenario": "\\ud800"}', 422),
        (b'{"\\ud800": 1}', 422),
        (b'{"scenario": "../../etc/passwd"}', 422),
        (b'{"policy": "turbo"}', 422),
        (b" " * 100_000, 413),
        (b"[" * 30_000, 400),
    ):
        done = post("/v1/sessions", content=content, headers={"content-type": "application/json"})
        assert done.status_code == status, (content[:40], done.status_code, done.text)
        assert "Traceback" not in done.text
    for path in ("/v1/sessions/..%2f..%2fetc%2fpasswd", "/v1/sessions/x", "/page/..%2fapp.py", "/page/app.py"):
        assert live.http.get(path).status_code in (404, 422)
    assert live.http.get("/", headers={"origin": "http://evil.example"}).status_code == 200
    assert live.http.get("/v1/sessions", headers={"origin": "http://evil.example"}).status_code == 403
    assert live.http.get("/v1/sessions", headers={"host": "evil.example"}).status_code == 403


def test_the_documents(live: Live) -> None:
    assert live.http.get("/healthz").json() == {"status": "ok"}
    spec = live.http.get("/openapi.json").json()
    stream = spec["paths"]["/v1/sessions/{id}/stream"]["get"]
    assert "ActionMessage" in json.dumps(stream["x-websocket"])
    described = next(x for x in _dictionaries(stream["x-websocket"]) if "plan" in x and "seq" in x)
    assert {"array", "null"} == {kind["type"] for kind in described["plan"]["anyOf"]}
    session = live.create(policy="eager")
    assert live.http.get(f"/v1/sessions/{session}/stream").status_code == 426
    with live.stream(session) as stream:
        for seq in range(1, 7):
            stream.step(seq, [0.5, 0.0])
    metrics = live.metrics()
    assert metrics["holdover_action_to_frame_seconds_count"] > 0
    assert metrics['holdover_block_calls_total{outcome="reused"}'] > 0
    assert metrics["holdover_bytes"] > 0
    assert live.http.get("/v1/scenarios").json() == {"scenarios": ["town", "coast"], "policies": ["eager", "never"]}


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dictionaries(inner)
    if isinstance(value, dict):
        yield value


def test_everyone_sees_only_their_own(tmp_path: Path) -> None:
    tokens = ("alice-0123456789abcdef", "bob-0123456789abcdef")
    with running(tmp_path, tokens=tokens, sessions_per_owner=2, snapshots_per_owner=1, sessions=3) as live:
        bob = httpx.Client(base_url=f"http://{live.address}", headers={"authorization": f"Bearer {tokens[1]}"})
        nobody = httpx.Client(base_url=f"http://{live.address}")
        id = live.create()
        assert nobody.get("/v1/sessions").status_code == 401
        assert nobody.get("/v1/sessions", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert bob.get("/v1/sessions").json() == []
        stored = live.http.post(f"/v1/sessions/{id}/snapshots").json()["id"]
        for call in (
            bob.get(f"/v1/sessions/{id}"), bob.delete(f"/v1/sessions/{id}"), bob.post(f"/v1/sessions/{id}/fork"),
            bob.post(f"/v1/sessions/{id}/snapshots"), bob.post(f"/v1/snapshots/{stored}/restore"),
            bob.delete(f"/v1/snapshots/{stored}"),
        ):  # fmt: skip
            assert call.status_code == 404
        for token, status in ((tokens[1], "404"), ("wrong", "401")):
            live.token = token
            with pytest.raises(InvalidStatus, match=status), live.stream(id):
                pass
        # The limits of one user, then those of the server.
        assert live.http.post(f"/v1/sessions/{id}/snapshots").status_code == 429
        live.create()
        full = live.http.post("/v1/sessions", json={})
        assert (full.status_code, full.headers["retry-after"]) == (429, "5")
        assert bob.post("/v1/sessions", json={}).status_code == 201
        assert bob.post("/v1/sessions", json={}).status_code == 503
        bob.close(), nobody.close()


def test_idle_sessions_go_to_disk_and_come_back(tmp_path: Path) -> None:
    with running(tmp_path, park_after=0.1) as live:
        id = live.create(seed=4)
        with live.stream(id) as stream:
            made = drive(stream, 4, 0, 3)
        deadline = time.monotonic() + 30
        while not all(session["parked"] for session in live.sessions()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert (tmp_path / f"session-{id}.safetensors").is_file()
        with live.stream(id) as stream:
            made += drive(stream, 4, 3, 3)
        assert all(near(*pair) for pair in zip(made, solo(4, 6), strict=True))


def test_idle_sessions_expire_and_leave_nothing(tmp_path: Path) -> None:
    with running(tmp_path, park_after=0.1, expire_after=0.5) as live:
        live.create(seed=4)
        deadline = time.monotonic() + 30
        while live.sessions():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert list(tmp_path.iterdir()) == []
        assert live.metrics()["holdover_bytes"] == 0


def test_memory_has_a_limit(tmp_path: Path) -> None:
    with running(tmp_path, max_bytes=1) as live:
        with live.stream(live.create()) as watched:  # admitted: the size of a session is not known yet
            watched.step(0, [0.0, 0.0])
            refused = live.http.post("/v1/sessions", json={})
            assert (refused.status_code, "memory is full" in refused.text) == (503, True)
        deadline = time.monotonic() + 30
        while any(session["connected"] for session in live.sessions()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        live.http.post("/v1/sessions", json={})
        assert [session["parked"] for session in live.sessions()] == [True]  # nobody read it, so it went to disk


def test_sessions_continue_after_a_restart(tmp_path: Path) -> None:
    with running(tmp_path) as live:
        id = live.create(seed=6)
        with live.stream(id) as stream:
            drive(stream, 6, 0, 2)
            unread = stream.step(2, action(2, 6), ack=False)
        stored = live.http.post(f"/v1/sessions/{id}/snapshots").json()["id"]
    with running(tmp_path) as live:
        assert live.info(id)["parked"]
        with live.stream(id, "?after=1") as stream:
            assert stream.receive() == unread
            stream.send(type="ack", chunk=2)
            made = drive(stream, 6, 3, 2)
        assert all(near(*pair) for pair in zip(made, solo(6, 5)[3:], strict=True))
        assert live.http.post(f"/v1/snapshots/{stored}/restore").json()["chunk"] == 3

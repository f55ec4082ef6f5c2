"""Random requests and messages: no 5xx, no traceback, no hang, and the session continues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from holdover_world.server.app import MISBEHAVED
from tests.holdover_world.server.live import Live, Stream, running

schemathesis = pytest.importorskip("schemathesis", reason="no Schemathesis; pip install schemathesis")
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

LENIENT = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("fuzz")
    with running(folder, sessions=100_000, sessions_per_owner=100_000, snapshots_per_owner=100_000) as server:
        yield server


def test_rest_calls(live: Live) -> None:
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
    operations = list(schemathesis.openapi.from_url(f"http://{live.address}/openapi.json").get_all_operations())
    assert len(operations) >= 13
    for found in operations:

        @LENIENT
        @given(case=found.ok().as_strategy())
        def call(case: Any) -> None:
            case.call_and_validate(checks=checks, timeout=60)

        call()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=70) | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9) | st.integers(0, 9), inner),
    max_leaves=12,
)
FIELDS = {
    "type": st.sampled_from(["action", "ack", "policy", "hello", ""]) | VALUES,
    "seq": st.integers(-1, 10) | VALUES,
    "action": st.lists(st.floats(-1.5, 1.5), max_size=3) | VALUES,
    "plan": st.none() | st.lists(st.lists(st.floats(-1.5, 1.5), max_size=3), max_size=3) | VALUES,
    "chunk": st.integers(-1, 10) | VALUES,
    "policy": st.sampled_from(["eager", "never", "turbo"]) | VALUES,
}
ACTIONS = {"type": st.just("action"), "seq": FIELDS["seq"], "action": FIELDS["action"]}
MESSAGES = st.one_of(
    st.binary(max_size=300),
    VALUES.map(msgpack.packb),
    st.fixed_dictionaries({}, optional=FIELDS).map(msgpack.packb),
    st.fixed_dictionaries(ACTIONS, optional={"plan": FIELDS["plan"]}).map(msgpack.packb),
)


def answers(stream: Stream) -> None:
    """The connection still answers: send a mistake whose answer is known."""
    stream.send(type="ack", chunk=10**9)
    for _ in range(40):
        if "chunk 1000000000 was not sent" in stream.receive().get("detail", ""):
            return
    raise AssertionError("there is no answer to the known mistake")


def test_stream_messages(live: Live) -> None:
    id = live.create()

    @settings(LENIENT, max_examples=150)
    @given(messages=st.lists(MESSAGES, min_size=1, max_size=8))
    def fuzz(messages: list[bytes]) -> None:
        with live.stream(id) as stream:
            for message in messages:
                stream.ws.send(message)
            answers(stream)

    fuzz()
    with live.stream(id) as stream:  # too many mistakes close the connection
        for _ in range(32):
            stream.ws.send(b"\xc1")
        with pytest.raises(ConnectionClosed) as closed:
            [stream.receive() for _ in range(64)]  # 33, and answers to the messages before
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == MISBEHAVED
    info = live.info(id)
    with live.stream(id, f"?after={info['chunk'] - 1}" if info["chunk"] else "") as stream:
        assert stream.step(stream.hello["seq"] + 1, [0.0, 0.0])["index"] == info["chunk"]

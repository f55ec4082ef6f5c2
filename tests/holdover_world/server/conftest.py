"""These tests need the extra `serve`."""

from __future__ import annotations

from importlib.util import find_spec

MISSING = [
    name
    for name in ("fastapi", "uvicorn", "websockets", "msgpack", "prometheus_client", "httpx")
    if find_spec(name) is None
]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> str:
    return f"tests of the server skipped, not installed: {', '.join(MISSING)}; run `make install`" if MISSING else ""

"""Without the extras there is nothing here to test."""

from __future__ import annotations

from importlib.util import find_spec

MISSING = [
    name
    for name in ("fastapi", "uvicorn", "websockets", "msgpack", "PIL", "prometheus_client", "gymnasium", "httpx")
    if find_spec(name) is None
]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> str:
    return f"tests/serve skipped, not installed: {', '.join(MISSING)}; run `make install`" if MISSING else ""

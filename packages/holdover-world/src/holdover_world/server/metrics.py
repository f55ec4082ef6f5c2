"""The metrics that Prometheus reads at ``/metrics``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.first_frame = Histogram(
            "holdover_first_frame_seconds",
            "Time from the creation of a session to its first frames.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.chunk = Histogram(
            "holdover_chunk_seconds",
            "Compute time of a batch of chunks.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.latency = Histogram(
            "holdover_action_to_frame_seconds",
            "Time from the arrival of an action to its frames.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.misses = Counter("holdover_deadline_misses", "Chunks that missed their deadline.", registry=registry)
        self.failures = Counter("holdover_failed_chunks", "Chunks that failed.", registry=registry)
        self.calls = Counter("holdover_block_calls", "Calls of the model's blocks.", ["outcome"], registry=registry)
        self.batch = Histogram(
            "holdover_batch_sessions", "Sessions in a batch.", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.sessions = Gauge(
            "holdover_sessions", "Sessions in memory (live) and on disk (parked).", ["state"], registry=registry
        )
        self.bytes = Gauge("holdover_bytes", "Bytes of sessions and snapshots in memory.", registry=registry)

    def render(self) -> bytes:
        return generate_latest(self.registry)

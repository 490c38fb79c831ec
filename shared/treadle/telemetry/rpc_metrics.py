"""What a service counts of its calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Bounds of the buckets of a call's duration; a stream may last as long as its answer."""


class RpcMetrics:
    """Calls by service, method and status. The interceptor says when one begins and ends.

    The label is `rpc_service`, since `service` is one that scrapers give to their targets.
    Health checks and reflection are counted, but not measured: a watch lasts as long as its client.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter(
            "treadle:rpc_requests",
            "Calls that ended, by status (a gRPC code's name).",
            ["rpc_service", "method", "code"],
            registry=registry,
        )
        self._running = Gauge(
            "treadle:rpc_requests_running",
            "Calls that run now, health checks and reflection aside.",
            ["rpc_service", "method"],
            registry=registry,
        )
        self._seconds = Histogram(
            "treadle:rpc_duration_seconds",
            "From a call's arrival to its end, health checks and reflection aside.",
            ["rpc_service", "method", "code"],
            buckets=SECONDS,
            registry=registry,
        )
        self._methods: dict[str, MethodMetrics] = {}

    def method(self, name: str, *, measured: bool) -> MethodMetrics:
        """The counts of one method that there is, "/package.Service/Method"."""
        if name not in self._methods:
            service, _, method = name.lstrip("/").rpartition("/")
            self._methods[name] = MethodMetrics(
                partial(self._ended.labels, service, method),
                partial(self._seconds.labels, service, method) if measured else None,
                self._running.labels(service, method) if measured else None,
            )
        return self._methods[name]


class MethodMetrics:
    """The counts of one method; its labels are looked up once."""

    def __init__(
        self,
        ended: Callable[[str], Counter],
        seconds: Callable[[str], Histogram] | None,
        running: Gauge | None,
    ) -> None:
        self._ended = ended
        self._seconds = seconds
        self._running = running
        self._by_code: dict[str, tuple[Counter, Histogram | None]] = {}

    def begin(self) -> None:
        """A call has come."""
        if self._running is not None:
            self._running.inc()

    def end(self, code: str, seconds: float) -> None:
        """It ended with a gRPC code's name."""
        if code not in self._by_code:
            measured = None if self._seconds is None else self._seconds(code)
            self._by_code[code] = self._ended(code), measured
        ended, durations = self._by_code[code]
        ended.inc()
        if self._running is not None:
            self._running.dec()
        if durations is not None:
            durations.observe(seconds)

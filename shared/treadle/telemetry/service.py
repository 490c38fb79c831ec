"""What a service says of itself beside its log: metrics over HTTP, traces where they are asked for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics

from treadle.security import ServerSecurity
from treadle.telemetry.config import TracesConfig
from treadle.telemetry.endpoint import MetricsEndpoint
from treadle.telemetry.loop_lag import LoopLag
from treadle.telemetry.rpc_metrics import RpcMetrics
from treadle.telemetry.tracing import Tracer

logger = logging.getLogger(__name__)


class Telemetry:
    """What a service's parts count in and trace with; made as it is, nobody is told of either."""

    def __init__(self, registry: CollectorRegistry | None = None, tracer: Tracer | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.tracer = tracer or Tracer()
        self.rpc = RpcMetrics(self.registry)


@contextlib.asynccontextmanager
async def running_telemetry(
    service: str, metrics_address: str, security: ServerSecurity
) -> AsyncIterator[Telemetry]:
    """Serves the service's metrics at `metrics_address` (empty: nowhere) until the block ends.

    The process and its event loop are measured, too. Raises Unavailable (ADDRESS_IN_USE), and
    FailedPrecondition for an address that would be open to strangers.
    """
    registry = CollectorRegistry()
    # A second series for each counter, which nobody asks for.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    ProcessCollector(registry=registry)
    lag = LoopLag(registry)
    async with contextlib.AsyncExitStack() as stack:
        if metrics_address:
            security.check_address(metrics_address)
            endpoint = MetricsEndpoint(
                metrics_address,
                registry,
                ssl_context=None if security.tls is None else security.tls.ssl_context(),
                authorize=security.authorize_scrape,
            )
            await stack.enter_async_context(endpoint)
        tracer = open_tracer(service, TracesConfig())
        stack.push_async_callback(tracer.close)
        looking = asyncio.create_task(lag.run(), name="loop-lag")
        try:
            yield Telemetry(registry, tracer)
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)


def open_tracer(service: str, config: TracesConfig) -> Tracer:
    """The tracer that the settings ask for; raises InvalidArgument for an exporter that there is not."""
    if config.chosen == "none":
        return Tracer()
    try:
        from treadle.telemetry.otel import OtelTracer, make_exporter
    except ImportError as error:
        logger.warning(
            "traces are asked for, but OpenTelemetry is not installed: pip install 'treadle[otel]'",
            extra={"cause": str(error)},
        )
        return Tracer()
    return OtelTracer(service, make_exporter(config.chosen))

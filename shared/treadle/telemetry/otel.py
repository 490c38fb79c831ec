"""Spans through OpenTelemetry's SDK; imported only where traces are on and the SDK is installed."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import ClassVar

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from treadle._version import __version__
from treadle.errors import Cancelled, TreadleError, invalid_field
from treadle.telemetry.tracing import TRACEPARENT, Attributes, Span, SpanKind, Tracer

_CLOSE_S = 3.0
"""A collector that is away must not hold up a service that leaves."""

_KINDS = {kind: trace.SpanKind[kind.name] for kind in SpanKind}


class OtelTracer(Tracer):
    """Sends spans in batches from a thread; nobody waits for a slow collector, spans are dropped then."""

    recording: ClassVar[bool] = True

    def __init__(self, service: str, exporter: SpanExporter) -> None:
        resource = Resource({"service.name": f"treadle-{service}", "service.version": __version__})
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before.
        self._provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("treadle", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def span(
        self,
        name: str,
        *,
        traceparent: str = "",
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
    ) -> Span:
        """See Tracer."""
        context = self._propagator.extract({TRACEPARENT: traceparent}) if traceparent else None
        started = self._tracer.start_span(name, context=context, kind=_KINDS[kind], attributes=attributes)
        return OtelSpan(self._tracer, started)

    async def close(self) -> None:
        """See Tracer."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, _CLOSE_S)


class OtelSpan(Span):
    """A span that is recorded, unless sampling left it out: then it is only passed on."""

    recording: ClassVar[bool] = True

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def traceparent(self) -> str:
        """See Span."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def child(
        self, name: str, kind: SpanKind = SpanKind.INTERNAL, attributes: Attributes | None = None
    ) -> Span:
        """See Span."""
        context = trace.set_span_in_context(self._span)
        started = self._tracer.start_span(name, context=context, kind=_KINDS[kind], attributes=attributes)
        return OtelSpan(self._tracer, started)

    def set(self, attributes: Attributes) -> None:
        """See Span."""
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """See Span."""
        self._span.add_event(name, attributes)

    def end(self, error: BaseException | None = None) -> None:
        """See Span."""
        if not self._span.is_recording():
            return
        if error is not None:
            reason = _reason(error)
            self._span.set_attribute("error.type", reason)
            self._span.set_status(Status(StatusCode.ERROR, reason))
        self._span.end()


def _reason(error: BaseException) -> str:
    """An error without its message, in which a client's words may stand."""
    if isinstance(error, TreadleError):
        return error.reason
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return Cancelled.default_reason
    return type(error).__name__


def make_exporter(chosen: str) -> SpanExporter:
    """The exporter of that name, set up by OpenTelemetry's variables; raises InvalidArgument."""
    match chosen:
        case "otlp":
            return OTLPSpanExporter()
        case "console":
            return ConsoleSpanExporter(out=sys.stderr, formatter=_line)
        case _:
            raise invalid_field(
                "OTEL_TRACES_EXPORTER", f'must be "otlp", "console" or "none"; got {chosen!r}'
            )


def _line(span: ReadableSpan) -> str:
    return f"{span.to_json(indent=None)}\n"

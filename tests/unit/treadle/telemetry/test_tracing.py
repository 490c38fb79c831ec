"""Tracing while it is off, and the settings that turn it on."""

from __future__ import annotations

import asyncio
import logging
import sys
from functools import partial

import pytest
from waiting import until

from treadle.errors import InvalidArgument
from treadle.security import ServerSecurity
from treadle.telemetry.config import TracesConfig
from treadle.telemetry.service import Telemetry, open_tracer, running_telemetry
from treadle.telemetry.tracing import (
    NO_SPAN,
    Span,
    Tracer,
    bind_span,
    current_span,
    trace_headers,
)

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Known(Span):
    """A span with a place in a trace."""

    @property
    def traceparent(self) -> str:
        return PARENT


async def test_without_traces_every_span_is_the_same_nothing():
    tracer = Tracer()
    span = tracer.span("x", traceparent=PARENT, attributes={"a": 1})
    assert span is NO_SPAN
    assert span.child("y") is NO_SPAN
    assert not span.recording
    assert not tracer.recording
    assert span.traceparent == ""
    with span as entered:
        entered.set({"a": 1})
        entered.event("b", {"c": 2})
        entered.end(ValueError("d"))
    await tracer.close()
    assert isinstance(Telemetry().tracer, Tracer)


async def test_the_current_span_travels_with_the_task():
    assert current_span() is NO_SPAN
    assert trace_headers() == ()
    span = Known()
    with bind_span(span):
        assert current_span() is span
        assert trace_headers() == (("traceparent", PARENT),)
        assert await asyncio.create_task(_seen()) is span
        with bind_span(NO_SPAN):
            assert trace_headers() == ()
        assert current_span() is span
    assert current_span() is NO_SPAN
    assert await asyncio.create_task(_seen()) is NO_SPAN


async def _seen() -> Span:
    return current_span()


async def test_a_generator_left_in_the_middle_undoes_nothing():
    async def stream():
        with bind_span(Known()):
            yield 1
            yield 2

    generator = stream()
    assert await asyncio.create_task(anext(generator)) == 1
    await asyncio.create_task(generator.aclose())
    assert current_span() is NO_SPAN


VARIABLES = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_TRACES_EXPORTER",
    "OTEL_SDK_DISABLED",
)


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({}, "none"),
        # What compose hands through from nothing.
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "", "OTEL_TRACES_EXPORTER": ""}, "none"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://here:4317"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://here:4317"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://here:4317"}, "none"),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"}, "none"),
    ],
)
def test_opentelemetrys_own_variables_decide(unset, environment, chosen):
    for name, value in environment.items():
        unset.setenv(name, value)
    assert TracesConfig().chosen == chosen


def test_an_exporter_that_there_is_not_is_named(unset):
    unset.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(InvalidArgument) as wrong:
        open_tracer("worker", TracesConfig())
    assert wrong.value.fields[0].field == "OTEL_TRACES_EXPORTER"


def test_without_the_packages_the_service_runs_without_traces(unset, caplog):
    unset.setenv("OTEL_TRACES_EXPORTER", "console")
    unset.setitem(sys.modules, "opentelemetry", None)
    unset.delitem(sys.modules, "treadle.telemetry.otel", raising=False)
    with caplog.at_level(logging.WARNING):
        tracer = open_tracer("worker", TracesConfig())
    assert type(tracer) is Tracer
    assert "treadle[otel]" in caplog.text


async def test_a_service_has_metrics_of_its_process_and_its_loop(unset):
    async with running_telemetry("worker", "", ServerSecurity()) as telemetry:
        looks = partial(telemetry.registry.get_sample_value, "treadle:event_loop_lag_seconds_count")
        await until(lambda: (looks() or 0) > 0, "the loop is looked at", 10)
        assert telemetry.registry.get_sample_value("process_resident_memory_bytes") > 1 << 20
        assert type(telemetry.tracer) is Tracer
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "loop-lag"]

"""Spans through OpenTelemetry: whose child each is, what it says, and what it never says."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from treadle.api.inference.v1 import inference_pb2, inference_pb2_grpc
from treadle.errors import InvalidArgument, ResourceExhausted
from treadle.local.ports import free_ports
from treadle.rpc import RpcServer, open_channel
from treadle.telemetry.otel import OtelTracer, make_exporter
from treadle.telemetry.service import Telemetry
from treadle.telemetry.tracing import SpanKind, bind_span, current_span

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CALLER}-01"
SERVICE = "treadle.api.inference.v1.InferenceService"
SECRET = "the prompt that nobody may read"


class Recorded:
    """A tracer, and what it has exported."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer = OtelTracer("test", self._exporter)

    async def spans(self) -> dict[str, ReadableSpan]:
        """By name, after the end."""
        await self.tracer.close()
        spans = self._exporter.get_finished_spans()
        assert not any(SECRET in span.to_json() for span in spans)
        found = {span.name: span for span in spans}
        assert len(found) == len(spans)
        return found


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def parent_id(span: ReadableSpan) -> str:
    return "" if span.parent is None else f"{span.parent.span_id:016x}"


def own_id(span: ReadableSpan) -> str:
    return f"{span.context.span_id:016x}"


async def test_spans_hang_on_their_parents(recorded):
    root = recorded.tracer.span("root", traceparent=PARENT, kind=SpanKind.SERVER)
    child = root.child("child", SpanKind.PRODUCER, {"a": 1})
    far = recorded.tracer.span("far", traceparent=child.traceparent, kind=SpanKind.CONSUMER)
    far.event("here", {"n": 2})
    far.set({"b": ["x", "y"]})
    for span in (far, child, root):
        assert span.recording
        span.end()
        span.end()
    spans = await recorded.spans()
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    assert parent_id(spans["root"]) == CALLER
    assert parent_id(spans["child"]) == own_id(spans["root"])
    assert parent_id(spans["far"]) == own_id(spans["child"])
    kinds = [spans[name].kind.name for name in ("root", "child", "far")]
    assert kinds == ["SERVER", "PRODUCER", "CONSUMER"]
    assert dict(spans["far"].attributes) == {"b": ("x", "y")}
    assert [(event.name, dict(event.attributes)) for event in spans["far"].events] == [("here", {"n": 2})]
    assert spans["root"].resource.attributes["service.name"] == "treadle-test"
    assert spans["root"].status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "x",
        "00-" + "0" * 32 + f"-{CALLER}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{CALLER}-01",
        f"ff-{TRACE}-{CALLER}-01",
        f"00-{TRACE}-{CALLER}-01-more",
        "00-" + "g" * 32 + f"-{CALLER}-01",
        PARENT * 1000,
        f"{PARENT}\n{SECRET}",
        "\ud800",
    ],
)
async def test_a_malformed_parent_begins_a_trace(recorded, traceparent):
    recorded.tracer.span("root", traceparent=traceparent).end()
    root = (await recorded.spans())["root"]
    assert root.parent is None
    assert f"{root.context.trace_id:032x}" != TRACE


async def test_what_the_caller_did_not_sample_is_passed_on_and_not_recorded(recorded):
    root = recorded.tracer.span("root", traceparent=PARENT[:-2] + "00")
    child = root.child("child")
    assert child.traceparent.startswith(f"00-{TRACE}-")
    assert child.traceparent.endswith("-00")
    child.end(ValueError(SECRET))
    root.end()
    assert await recorded.spans() == {}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InvalidArgument(SECRET, reason="TOO_LONG"), "TOO_LONG"),
        (InvalidArgument(SECRET), "INVALID_FIELD"),
        (ValueError(SECRET), "ValueError"),
        (asyncio.CancelledError(SECRET), "CANCELLED"),
        (GeneratorExit(SECRET), "CANCELLED"),
        (KeyError(SECRET), "KeyError"),
    ],
)
async def test_an_error_is_kept_by_its_reason_alone(recorded, error, reason):
    with pytest.raises(type(error)), recorded.tracer.span("failed"):
        raise error
    span = (await recorded.spans())["failed"]
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, reason)
    assert dict(span.attributes) == {"error.type": reason}
    assert not span.events


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    """Says what its span was, and calls itself once."""

    onward: inference_pb2_grpc.InferenceServiceStub | None = None

    async def Generate(self, request, context):
        if request.generation.model == "full":
            raise ResourceExhausted(SECRET, reason="LANE_FULL")
        if self.onward is not None:
            with bind_span(current_span().child("inside")) as _:
                await self.onward.Cancel(inference_pb2.CancelRequest(request_id=SECRET), timeout=5)
            current_span().child("unfinished")
        return inference_pb2.GenerateResponse()

    async def Cancel(self, request, context):
        return inference_pb2.CancelResponse()

    async def GenerateStream(self, request, context):
        yield inference_pb2.GenerateStreamResponse()
        await asyncio.sleep(30)


@pytest.fixture
async def traced(recorded) -> AsyncIterator[tuple[Servicer, grpc.aio.Channel]]:
    servicer = Servicer()
    server = RpcServer("127.0.0.1:0", telemetry=Telemetry(tracer=recorded.tracer))
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, servicer, SERVICE)
    async with server.running(0.1), open_channel(f"127.0.0.1:{server.port}", traced=True) as channel:
        yield servicer, channel


async def test_a_call_is_a_span_and_takes_its_trace_along(recorded, traced):
    servicer, channel = traced
    servicer.onward = stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = inference_pb2.GenerateRequest(generation={"text": SECRET})
    await stub.Generate(request, timeout=5, metadata=(("traceparent", PARENT),))
    spans = await recorded.spans()
    call, onward = spans[f"{SERVICE}/Generate"], spans[f"{SERVICE}/Cancel"]
    assert set(spans) == {call.name, onward.name}, "an open span is not exported"
    assert parent_id(call) == CALLER
    assert call.context.trace_id == onward.context.trace_id == int(TRACE, 16)
    assert parent_id(onward) not in (CALLER, own_id(call), "")
    assert dict(call.attributes) == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{SERVICE}/Generate",
        "rpc.response.status_code": "OK",
    }
    assert call.kind.name == "SERVER"


async def test_a_call_that_fails_and_one_that_is_left(recorded, traced):
    _, channel = traced
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = inference_pb2.GenerateRequest(generation={"model": "full", "text": SECRET})
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Generate(request, timeout=5)
    call = stub.GenerateStream(inference_pb2.GenerateStreamRequest(generation={"text": SECRET}), timeout=30)
    await call.read()
    call.cancel()
    await asyncio.sleep(0.3)
    spans = await recorded.spans()
    found = {
        name.rpartition("/")[2]: (span.status.description, span.attributes["rpc.response.status_code"])
        for name, span in spans.items()
    }
    assert found == {
        "Generate": ("LANE_FULL", "RESOURCE_EXHAUSTED"),
        "GenerateStream": ("CANCELLED", "CANCELLED"),
    }


async def test_a_span_on_the_console_is_a_line_of_json(capsys):
    tracer = OtelTracer("test", make_exporter("console"))
    tracer.span("a", attributes={"n": 1}).end()
    tracer.span("b").end()
    await tracer.close()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["name"] for line in lines] == ["a", "b"]


AWAY = """
import asyncio, sys, time
from treadle.telemetry.otel import OtelTracer, make_exporter

async def main():
    tracer = OtelTracer("test", make_exporter("otlp"))
    for number in range(3000):
        tracer.span(f"span {number}").end()
    began = time.monotonic()
    await tracer.close()
    print(time.monotonic() - began)

asyncio.run(main())
"""


def test_a_collector_that_is_away_holds_nobody_up():
    (port,) = free_ports(1)
    variables = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", AWAY], env=variables, capture_output=True, text=True, timeout=60, check=True
    )
    took_s, closed_s = time.monotonic() - began, float(result.stdout)
    print(f"closed within {closed_s:.2f} s; the process, start and all, took {took_s:.2f} s")
    assert closed_s < 8
    assert took_s < 30

"""The server as every service runs it: statuses, malformed messages, health, reflection."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from treadle.api.inference.v1 import inference_pb2, inference_pb2_grpc
from treadle.errors import (
    BY_CODE,
    FieldViolation,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    invalid_field,
)
from treadle.rpc import RpcServer, from_rpc_error, from_status, open_channel, to_status

SERVICE = "treadle.api.inference.v1.InferenceService"


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    async def Generate(self, request, context):
        if request.generation.model == "full":
            raise ResourceExhausted("full", reason="LANE_FULL", retry_after_s=1.5)
        raise invalid_field("generation.model", "must be named; got ''")

    async def Cancel(self, request, context):
        raise ZeroDivisionError("secret")

    async def GenerateStream(self, request, context):
        yield inference_pb2.GenerateStreamResponse()
        raise Unavailable("away", retry_after_s=0.25)

    async def BatchGenerate(self, request_iterator, context):
        async for _ in request_iterator:
            yield inference_pb2.BatchGenerateResponse(index=1)


@pytest.fixture
async def server() -> AsyncIterator[RpcServer]:
    server = RpcServer("127.0.0.1:0")
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, Servicer(), SERVICE)
    async with server.running(0.1):
        yield server


@pytest.fixture
async def channel(server: RpcServer) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


async def failure(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), from_rpc_error(caught.value)


async def test_errors_reach_the_client_with_their_details(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    code, error = await failure(stub.Generate(inference_pb2.GenerateRequest(), timeout=5))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.fields] == ["generation.model"]
    request = inference_pb2.GenerateRequest(generation={"model": "full"})
    code, error = await failure(stub.Generate(request, timeout=5))
    assert (code, error.reason, error.retry_after_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LANE_FULL", 1.5)


async def test_a_fault_says_nothing_of_its_inside(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    code, error = await failure(stub.Cancel(inference_pb2.CancelRequest(), timeout=5))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in error.message


async def test_what_has_no_code_is_unimplemented(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    code, error = await failure(stub.Embed(inference_pb2.EmbedRequest(), timeout=5))
    assert (code, error.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED")


async def test_a_stream_fails_after_what_it_sent(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    received = 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.GenerateStream(inference_pb2.GenerateStreamRequest(), timeout=5):
            received += 1
    assert received == 1
    assert from_rpc_error(caught.value).retry_after_s == 0.25


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "BatchGenerate"])
async def test_undecodable_messages_are_invalid_arguments(channel, method):
    data = b"\x0a\x03\x0a\x01\xff"  # generation.request_id with invalid UTF-8
    if method == "Generate":
        call = channel.unary_unary(f"/{SERVICE}/{method}")(data, timeout=5)
    elif method == "GenerateStream":
        call = channel.unary_stream(f"/{SERVICE}/{method}")(data, timeout=5).read()
    else:
        call = channel.stream_stream(f"/{SERVICE}/{method}")(iter([data]), timeout=5).read()
    code, error = await failure(call)
    assert (code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


async def test_readiness_and_liveness_are_apart(server, channel):
    stub = health_pb2_grpc.HealthStub(channel)

    async def check(service: str) -> int:
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status

    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert [await check(name) for name in ("", SERVICE, "liveness")] == [not_serving, not_serving, serving]
    await server.set_ready(True)
    assert [await check(name) for name in ("", SERVICE, "liveness")] == [serving, serving, serving]


async def test_health_can_be_watched(server, channel):
    seen = []
    stub = health_pb2_grpc.HealthStub(channel)
    async for response in stub.Watch(health_pb2.HealthCheckRequest(), timeout=5):
        seen.append(response.status)
        if len(seen) == 2:
            break
        await server.set_ready(True)
    assert seen == [health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING]


async def test_reflection_lists_the_services(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for response in stub.ServerReflectionInfo(iter([request]), timeout=5):
        names = {service.name for service in response.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


async def test_a_taken_port_is_named(server):
    with pytest.raises(Unavailable, match=str(server.port)):
        await RpcServer(f"127.0.0.1:{server.port}").start()


def test_statuses_stay_small_and_come_back():
    rng = random.Random(7)
    sizes = []
    for kind in BY_CODE.values():
        fields = [FieldViolation("f" * rng.randint(1, 900), "d" * rng.randint(1, 900)) for _ in range(40)]
        error = kind("m" * rng.randint(1, 9000), reason="SOME_REASON", fields=fields, retry_after_s=2.0)
        status = to_status(error)
        sizes.append(status.ByteSize())
        back = from_status(status_pb2.Status.FromString(status.SerializeToString()))
        assert type(back) is kind
        assert back.reason == "SOME_REASON"
        assert back.retry_after_s == 2.0
        assert len(back.fields) >= 1
    print(f"{len(sizes)} statuses, the largest {max(sizes)} bytes")
    assert max(sizes) <= 4096


def test_an_invalid_field_names_it():
    error = invalid_field("a.b", "must be 1")
    assert isinstance(error, InvalidArgument)
    assert error.fields == (FieldViolation("a.b", "must be 1"),)


async def test_a_connection_may_take_its_time(server):
    """A handshake over a slow network, or on a busy machine, takes longer than the first back-off."""
    accepted = 0

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        await asyncio.sleep(0.5)
        there, back = await asyncio.open_connection("127.0.0.1", server.port)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, back), copy(there, writer), return_exceptions=True)

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as slow:
        port = slow.sockets[0].getsockname()[1]
        async with open_channel(f"127.0.0.1:{port}") as channel:
            request = health_pb2.HealthCheckRequest(service="liveness")
            await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    assert accepted == 1

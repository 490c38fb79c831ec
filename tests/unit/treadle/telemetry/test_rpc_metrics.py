"""What a server counts of its calls, whatever becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from waiting import until

from treadle.api.inference.v1 import inference_pb2, inference_pb2_grpc
from treadle.errors import ResourceExhausted
from treadle.rpc import RpcServer, open_channel
from treadle.security import Role, ServerSecurity
from treadle.security.key_file import KeyFile, add_key
from treadle.security.keys import new_key
from treadle.telemetry.rpc_metrics import RpcMetrics
from treadle.telemetry.service import Telemetry

SERVICE = "treadle.api.inference.v1.InferenceService"
HEALTH = "grpc.health.v1.Health"


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    async def Generate(self, request, context):
        if request.generation.model == "full":
            raise ResourceExhausted("full")
        if request.generation.model == "slow":
            await asyncio.sleep(30)
        return inference_pb2.GenerateResponse()

    async def Cancel(self, request, context):
        raise ZeroDivisionError

    async def GenerateStream(self, request, context):
        yield inference_pb2.GenerateStreamResponse()
        if request.generation.model == "slow":
            await asyncio.sleep(30)


class Counts:
    """The registry's numbers of one service's methods."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def ended(self, method: str, code: str, service: str = SERVICE) -> float:
        labels = {"rpc_service": service, "method": method, "code": code}
        return self._registry.get_sample_value("treadle:rpc_requests_total", labels) or 0.0

    def measured(self, method: str, code: str, service: str = SERVICE) -> float | None:
        labels = {"rpc_service": service, "method": method, "code": code}
        return self._registry.get_sample_value("treadle:rpc_duration_seconds_count", labels)

    def running(self, method: str, service: str = SERVICE) -> float | None:
        labels = {"rpc_service": service, "method": method}
        return self._registry.get_sample_value("treadle:rpc_requests_running", labels)

    async def until_running(self, method: str, count: float) -> None:
        await until(lambda: self.running(method) == count, f"{count:.0f} run", 10)


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def counts(telemetry: Telemetry) -> Counts:
    return Counts(telemetry.registry)


@pytest.fixture
async def channel(telemetry: Telemetry) -> AsyncIterator[grpc.aio.Channel]:
    server = RpcServer("127.0.0.1:0", telemetry=telemetry)
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, Servicer(), SERVICE)
    async with server.running(0.1), open_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


async def ends(call) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def test_calls_are_counted_by_how_they_end(channel, counts):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)

    def generate(model: str, timeout: float = 10):
        return stub.Generate(inference_pb2.GenerateRequest(generation={"model": model}), timeout=timeout)

    for _ in range(3):
        assert await ends(generate("")) == "OK"
    assert await ends(generate("full")) == "RESOURCE_EXHAUSTED"
    assert await ends(generate("slow", timeout=0.3)) == "DEADLINE_EXCEEDED"
    raw = channel.unary_unary(f"/{SERVICE}/Generate")(b"\x0a\x03\x0a\x01\xff", timeout=10)
    assert await ends(raw) == "INVALID_ARGUMENT"
    assert await ends(stub.Cancel(inference_pb2.CancelRequest(), timeout=10)) == "INTERNAL"
    assert await ends(stub.Embed(inference_pb2.EmbedRequest(), timeout=10)) == "UNIMPLEMENTED"
    await counts.until_running("Generate", 0)
    found = {
        (method, code): counts.ended(method, code)
        for method, code in (
            ("Generate", "OK"),
            ("Generate", "RESOURCE_EXHAUSTED"),
            ("Generate", "DEADLINE_EXCEEDED"),
            ("Generate", "INVALID_ARGUMENT"),
            ("Cancel", "INTERNAL"),
            ("Embed", "UNIMPLEMENTED"),
        )
    }
    assert list(found.values()) == [3, 1, 1, 1, 1, 1]
    assert all(counts.measured(*key) == number for key, number in found.items())
    print(f"{sum(found.values()):.0f} calls: {found}")


async def test_a_client_that_leaves_is_counted_once_its_call_is_over(channel, counts):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = inference_pb2.GenerateStreamRequest(generation={"model": "slow"})
    calls = [stub.GenerateStream(request, timeout=30) for _ in range(4)]
    for call in calls:
        await call.read()
    assert counts.running("GenerateStream") == 4
    for call in calls[:3]:
        call.cancel()
    await counts.until_running("GenerateStream", 1)
    assert counts.ended("GenerateStream", "CANCELLED") == 3
    calls[3].cancel()
    await counts.until_running("GenerateStream", 0)
    assert counts.measured("GenerateStream", "CANCELLED") == 4


async def test_health_is_counted_and_not_measured(channel, counts):
    stub = health_pb2_grpc.HealthStub(channel)
    for _ in range(5):
        await stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=5)
    assert counts.ended("Check", "OK", HEALTH) == 5
    assert counts.measured("Check", "OK", HEALTH) is None
    assert counts.running("Check", HEALTH) is None


async def test_no_stranger_makes_a_series(channel, telemetry):
    """A method that there is not is nobody's: it is refused, and not counted."""
    for number in range(20):
        call = channel.unary_unary(f"/{SERVICE}/Method{number}")(b"", timeout=5)
        assert await ends(call) == "UNIMPLEMENTED"
    methods = {
        sample.labels["method"]
        for family in telemetry.registry.collect()
        for sample in family.samples
        if "method" in sample.labels
    }
    assert methods == set()


async def test_refused_callers_are_counted(tmp_path):
    _, record = new_key("web", [Role.INFER])
    add_key(tmp_path / "keys.json", record)
    telemetry = Telemetry()
    security = ServerSecurity(keys=KeyFile.read(tmp_path / "keys.json"))
    server = RpcServer("127.0.0.1:0", security=security, telemetry=telemetry)
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, Servicer(), SERVICE)
    async with server.running(0.1), open_channel(f"127.0.0.1:{server.port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        assert await ends(stub.Generate(inference_pb2.GenerateRequest(), timeout=5)) == "UNAUTHENTICATED"
    assert Counts(telemetry.registry).ended("Generate", "UNAUTHENTICATED") == 1


def test_a_method_is_split_into_service_and_name():
    registry = CollectorRegistry()
    metrics = RpcMetrics(registry)
    method = metrics.method("/a.b.Service/Method", measured=True)
    assert metrics.method("/a.b.Service/Method", measured=True) is method
    method.begin()
    method.end("OK", 0.3)
    labels = {"rpc_service": "a.b.Service", "method": "Method", "code": "OK"}
    assert registry.get_sample_value("treadle:rpc_requests_total", labels) == 1
    assert registry.get_sample_value("treadle:rpc_duration_seconds_sum", labels) == 0.3
    assert registry.get_sample_value("treadle:rpc_duration_seconds_bucket", labels | {"le": "0.25"}) == 0
    assert registry.get_sample_value("treadle:rpc_duration_seconds_bucket", labels | {"le": "0.5"}) == 1

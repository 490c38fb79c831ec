"""The trainer as a process: healthy, reflected, UNIMPLEMENTED in every call, gone on SIGTERM."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from started_service import started

from treadle.api.training.v1 import training_pb2, training_pb2_grpc
from treadle.rpc import from_rpc_error, open_channel

SERVICE = training_pb2.DESCRIPTOR.services_by_name["TrainingService"]


@dataclass
class Process:
    """A running service."""

    popen: subprocess.Popen[bytes]
    address: str


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Process]:
    with started("trainer", tmp_path / "trainer.log") as (process, address):
        yield Process(process, address)


async def test_health_reflection_and_stop(trainer: Process) -> None:
    async with open_channel(trainer.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "liveness", SERVICE.full_name):
            response = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([request]), timeout=10):
            names = {service.name for service in answer.list_services_response.service}
            assert SERVICE.full_name in names
    trainer.popen.send_signal(signal.SIGTERM)
    assert trainer.popen.wait(10) == 0


async def test_every_call_is_unimplemented(trainer: Process) -> None:
    seen = []
    async with open_channel(trainer.address) as channel:
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        for method in SERVICE.methods:
            request = getattr(training_pb2, method.input_type.name)()
            call = getattr(stub, method.name)(request, timeout=10)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call.read() if method.server_streaming else call)
            error = from_rpc_error(caught.value)
            assert error.code == "UNIMPLEMENTED"
            assert method.name in error.message
            assert error.reason == "TRAINING_UNIMPLEMENTED"
            seen.append(method.name)
    print(f"{len(seen)} calls: {', '.join(seen)}")
    assert len(seen) == len(SERVICE.methods) >= 9

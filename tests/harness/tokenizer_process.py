"""A tokenizer as a process, and a registry that the test holds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from started_service import started

from treadle.api.registry.v1 import artifact_pb2, registry_pb2, registry_pb2_grpc
from treadle.api.tokenizer.v1 import tokenizer_pb2 as pb
from treadle.api.tokenizer.v1 import tokenizer_pb2_grpc
from treadle.errors import NotFound, TreadleError
from treadle.models.stored_folder import file_digest
from treadle.rpc import RpcServer, from_rpc_error, open_channel


class HeldRegistry(registry_pb2_grpc.RegistryServiceServicer):
    """Knows the artifacts that a test put in."""

    def __init__(self) -> None:
        self.artifacts: dict[str, artifact_pb2.Artifact] = {}
        self.num_asked = 0

    def add(self, alias: str, folder: Path, *, number: int) -> artifact_pb2.Artifact:
        """An artifact with digests of its own."""
        digest, tokenizer, presentation = (f"sha256:{kind}{number:063}" for kind in "abc")
        artifact = artifact_pb2.Artifact(
            digest=digest,
            tokenizer_digest=tokenizer,
            presentation_digest=presentation,
            location=str(folder),
            files=[
                artifact_pb2.ArtifactFile(path=path.name, digest=file_digest(path), bytes=path.stat().st_size)
                for path in folder.glob("*.j*")
            ],
        )
        self.artifacts[alias] = self.artifacts[digest] = artifact
        return artifact

    async def ResolveModel(self, request, context):
        self.num_asked += 1
        if request.model not in self.artifacts:
            raise NotFound(f"no model {request.model!r}", reason="MODEL_NOT_FOUND")
        return registry_pb2.ResolveModelResponse(artifact=self.artifacts[request.model])

    async def ListArtifacts(self, request, context):
        return registry_pb2.ListArtifactsResponse()


@dataclass
class Service:
    """A tokenizer process, its registry and a way to call it."""

    registry: HeldRegistry
    process: subprocess.Popen[bytes]
    log: Path
    address: str
    channel: grpc.aio.Channel
    folder: Path
    stub: Any = field(init=False)

    def __post_init__(self) -> None:
        self.stub = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)

    def logged(self, message: str) -> list[dict[str, Any]]:
        """The log's entries with this message."""
        entries = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [entry for entry in entries if entry["message"] == message]


@contextlib.asynccontextmanager
async def running_registry(registry: HeldRegistry, address: str = "127.0.0.1:0") -> AsyncIterator[RpcServer]:
    server = RpcServer(address)
    server.add(
        registry_pb2_grpc.add_RegistryServiceServicer_to_server,
        registry,
        "treadle.api.registry.v1.RegistryService",
    )
    async with server.running(grace_s=0.1):
        yield server


@contextlib.asynccontextmanager
async def running_service(
    registry: HeldRegistry, registry_address: str, home: Path, folder: Path
) -> AsyncIterator[Service]:
    log = home / "tokenizer.log"
    settings = {"TREADLE_REGISTRY_ADDRESS": registry_address, "TREADLE_TOKENIZER_TEMPLATE_DEADLINE_S": "1"}
    with started("tokenizer", log, settings) as (process, address):
        async with open_channel(address) as channel:
            yield Service(registry, process, log, address, channel, folder)


async def readiness(channel: grpc.aio.Channel) -> int:
    response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return int(response.status)


async def until_ready(channel: grpc.aio.Channel) -> None:
    for _ in range(600):
        if await readiness(channel) == health_pb2.HealthCheckResponse.SERVING:
            return
        await asyncio.sleep(0.05)
    pytest.fail("not ready within 30 s")


async def failure(call: Any) -> TreadleError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def children_of(process: int) -> list[int]:
    return [
        int(child)
        for thread in Path(f"/proc/{process}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]


def is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def inputs(*texts: str) -> list[pb.EncodeInput]:
    return [pb.EncodeInput(text=text) for text in texts]

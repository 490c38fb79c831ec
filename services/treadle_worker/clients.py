"""What the worker asks of other services."""

from __future__ import annotations

import grpc

from treadle.api.registry.v1 import registry_pb2, registry_pb2_grpc
from treadle.rpc import from_rpc_error
from treadle_worker.convert import to_artifact
from treadle_worker.jobs import Artifact

TIMEOUT_S = 10.0


class RegistryClient:
    """The registry, over a channel that the caller closes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = registry_pb2_grpc.RegistryServiceStub(channel)

    async def resolve(self, model: str) -> Artifact:
        """The artifact that an alias or digest means; raises NotFound, Unavailable and others."""
        request = registry_pb2.ResolveModelRequest(model=model)
        try:
            response = await self._stub.ResolveModel(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return to_artifact(response.artifact)

"""The registry over gRPC, behind the plain interface that the rest knows."""

from __future__ import annotations

import grpc

from treadle.api.registry.v1 import registry_pb2, registry_pb2_grpc
from treadle.rpc import from_rpc_error
from treadle_tokenizer.convert import to_artifact
from treadle_tokenizer.models import Artifact


class GrpcRegistry:
    """See `treadle_tokenizer.models.Registry`."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float) -> None:
        self._stub = registry_pb2_grpc.RegistryServiceStub(channel)
        self._timeout_s = timeout_s

    async def resolve(self, model: str) -> Artifact:
        """See Registry."""
        request = registry_pb2.ResolveModelRequest(model=model)
        try:
            response = await self._stub.ResolveModel(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return to_artifact(response.artifact)

    async def is_there(self) -> bool:
        """Whether the registry answers at all."""
        try:
            await self._stub.ListArtifacts(
                registry_pb2.ListArtifactsRequest(page_size=1), timeout=self._timeout_s
            )
        except grpc.aio.AioRpcError as error:
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return True

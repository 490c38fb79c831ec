"""A registry that passes on what another one says, changed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from treadle.api.registry.v1 import artifact_pb2, registry_pb2_grpc, transfer_pb2
from treadle.rpc import RpcServer


class Liar(registry_pb2_grpc.RegistryServiceServicer):
    """Changes artifacts, and has content of its own by its digest."""

    def __init__(
        self,
        stub: Any,
        change: Callable[[artifact_pb2.Artifact], None],
        content: Mapping[str, bytes] | None = None,
    ) -> None:
        self._stub, self._change, self._content = stub, change, content or {}

    async def ResolveModel(self, request, context):  # type: ignore[no-untyped-def]
        response = await self._stub.ResolveModel(request)
        self._change(response.artifact)
        return response

    async def DownloadBlob(self, request, context):  # type: ignore[no-untyped-def]
        data = self._content.get(request.digest)
        if data is not None:
            yield transfer_pb2.DownloadBlobResponse(offset=0, data=data, total_bytes=len(data))
            return
        async for response in self._stub.DownloadBlob(request):
            yield response


@contextlib.asynccontextmanager
async def lying(
    stub: Any, change: Callable[[artifact_pb2.Artifact], None], content: Mapping[str, bytes] | None = None
) -> AsyncIterator[int]:
    """The port of one that runs until the block's end."""
    server = RpcServer("127.0.0.1:0")
    server.add(
        registry_pb2_grpc.add_RegistryServiceServicer_to_server,
        Liar(stub, change, content),
        "treadle.api.registry.v1.RegistryService",
    )
    async with server.running(grace_s=0.1):
        yield server.port

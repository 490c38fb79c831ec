"""Operations and artifacts."""

# ruff: noqa: N802 - RPCs are named by the contract

from __future__ import annotations

from google.longrunning import operations_proto_pb2

from treadle.api.registry.v1 import registry_pb2, registry_pb2_grpc
from treadle_registry.names import check_digest
from treadle_registry.operations.operations import Operations
from treadle_registry.registry import Registry
from treadle_registry.servicing.convert import alias_to_proto, published_to_proto
from treadle_registry.servicing.convert_operations import (
    import_from_proto,
    operation_to_proto,
    verification_from_proto,
)
from treadle_registry.servicing.page_bytes import page_in_bytes


class ArtifactMethods(registry_pb2_grpc.RegistryServiceServicer):
    """Brings artifacts in, finds, verifies and deletes them."""

    _registry: Registry
    _operations: Operations

    async def ImportModel(
        self, request: registry_pb2.ImportModelRequest, context: object
    ) -> operations_proto_pb2.Operation:
        """Starts an import."""
        operation = await self._operations.start(request.request_id, import_from_proto(request))
        return operation_to_proto(operation, self._registry.store)

    async def ResolveModel(
        self, request: registry_pb2.ResolveModelRequest, context: object
    ) -> registry_pb2.ResolveModelResponse:
        """An alias or digest to its artifact."""
        published, alias = await self._registry.resolve(request.model)
        return registry_pb2.ResolveModelResponse(
            artifact=published_to_proto(published), alias=alias_to_proto(alias) if alias else None
        )

    async def ListArtifacts(
        self, request: registry_pb2.ListArtifactsRequest, context: object
    ) -> registry_pb2.ListArtifactsResponse:
        """A page of artifacts."""
        page, token = await self._registry.artifacts(request.page_size, request.page_token)
        artifacts, token = page_in_bytes(
            page, token, "artifacts", lambda one: one.manifest.digest, published_to_proto
        )
        return registry_pb2.ListArtifactsResponse(artifacts=artifacts, next_page_token=token)

    async def DeleteArtifact(
        self, request: registry_pb2.DeleteArtifactRequest, context: object
    ) -> registry_pb2.DeleteArtifactResponse:
        """Deletes an artifact that no alias holds."""
        freed = await self._registry.delete_artifact(request.digest)
        return registry_pb2.DeleteArtifactResponse(freed_bytes=freed)

    async def VerifyArtifact(
        self, request: registry_pb2.VerifyArtifactRequest, context: object
    ) -> operations_proto_pb2.Operation:
        """Starts to hash an artifact's files, or every artifact's."""
        if request.digest:
            await self._registry.resolve(check_digest(request.digest, "digest"))
        operation = await self._operations.start(request.request_id, verification_from_proto(request))
        return operation_to_proto(operation, self._registry.store)

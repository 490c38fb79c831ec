"""Artifacts made of artifacts."""

# ruff: noqa: N802 - RPCs are named by the contract

from __future__ import annotations

from google.longrunning import operations_proto_pb2

from treadle.api.registry.v1 import derivation_pb2, registry_pb2_grpc
from treadle_registry.operations.job import DeriveJob
from treadle_registry.operations.operations import OperationRequest, Operations
from treadle_registry.registry import Registry
from treadle_registry.servicing.convert_derivation import derivation_from_proto
from treadle_registry.servicing.convert_operations import operation_to_proto


class DerivationMethods(registry_pb2_grpc.RegistryServiceServicer):
    """Conversions of what is in the store."""

    _registry: Registry
    _operations: Operations

    async def DeriveArtifact(
        self, request: derivation_pb2.DeriveArtifactRequest, context: object
    ) -> operations_proto_pb2.Operation:
        """Starts to make another form of an artifact."""
        derivation = derivation_from_proto(request.derivation)
        parent, _ = await self._registry.resolve(request.model)
        job = DeriveJob(request.model, derivation, parent.manifest.digest)
        operation = await self._operations.start(request.request_id, OperationRequest(job, request.alias))
        return operation_to_proto(operation, self._registry.store)

"""google.longrunning.Operations over the registry's jobs."""

# ruff: noqa: N802 - RPCs are named by the contract

from __future__ import annotations

from google.longrunning import operations_pb2_grpc, operations_proto_pb2
from google.protobuf import empty_pb2

from treadle.errors import invalid_field
from treadle_registry.operations.operations import LISTING, Operations
from treadle_registry.servicing.convert_operations import operation_to_proto
from treadle_registry.servicing.page_bytes import page_in_bytes
from treadle_registry.store.store import Store

SERVICE_NAME = "google.longrunning.Operations"

_LONGEST_WAIT_S = 60.0
"""Of one WaitOperation; a client that wants longer asks again."""


class OperationsServicer(operations_pb2_grpc.OperationsServicer):  # type: ignore[misc]
    """Follows, cancels and forgets operations."""

    def __init__(self, operations: Operations, store: Store) -> None:
        self._operations, self._store = operations, store

    async def GetOperation(
        self, request: operations_proto_pb2.GetOperationRequest, context: object
    ) -> operations_proto_pb2.Operation:
        """An operation as it is now."""
        return operation_to_proto(await self._operations.get(request.name), self._store)

    async def ListOperations(
        self, request: operations_proto_pb2.ListOperationsRequest, context: object
    ) -> operations_proto_pb2.ListOperationsResponse:
        """A page of operations, newest first."""
        if request.filter:
            raise invalid_field("filter", "is not supported; leave it out")
        page, token = await self._operations.list(request.page_size, request.page_token)
        operations, token = page_in_bytes(
            page, token, LISTING, lambda row: row[0], lambda row: operation_to_proto(row[1], self._store)
        )
        return operations_proto_pb2.ListOperationsResponse(operations=operations, next_page_token=token)

    async def WaitOperation(
        self, request: operations_proto_pb2.WaitOperationRequest, context: object
    ) -> operations_proto_pb2.Operation:
        """An operation once it has ended, or as it is when the time is up."""
        asked = request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else _LONGEST_WAIT_S
        timeout_s = max(0.0, min(asked, _LONGEST_WAIT_S))
        return operation_to_proto(await self._operations.wait(request.name, timeout_s), self._store)

    async def CancelOperation(
        self, request: operations_proto_pb2.CancelOperationRequest, context: object
    ) -> empty_pb2.Empty:
        """Kills what still runs."""
        await self._operations.cancel(request.name)
        return empty_pb2.Empty()

    async def DeleteOperation(
        self, request: operations_proto_pb2.DeleteOperationRequest, context: object
    ) -> empty_pb2.Empty:
        """Forgets an operation that has ended."""
        await self._operations.delete(request.name)
        return empty_pb2.Empty()

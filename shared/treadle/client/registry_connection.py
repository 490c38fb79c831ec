"""A channel to a registry, calls that are tried again, operations that are followed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.longrunning import operations_pb2_grpc, operations_proto_pb2
from google.protobuf.message import Message

from treadle.api.registry.v1 import registry_pb2_grpc
from treadle.client.connection import Connection
from treadle.client.reconnect import Reconnects
from treadle.errors import Internal
from treadle.rpc import from_status
from treadle.security import Credentials

DEFAULT_REGISTRY_ADDRESS = "127.0.0.1:50052"
LONG_S = 3600.0
"""For what takes as long as a model is large."""
_QUICK_S = 10.0
_POLL_EVERY_S = 0.1
_RECONNECTS = 6
_T = TypeVar("_T")


class RegistryConnection(Connection):
    """What the areas of the registry's client have in common."""

    def __init__(
        self, address: str = DEFAULT_REGISTRY_ADDRESS, *, credentials: Credentials | None = None
    ) -> None:
        super().__init__(address, credentials)

    @property
    def _stub(self) -> registry_pb2_grpc.RegistryServiceStub:
        return registry_pb2_grpc.RegistryServiceStub(self._channel)

    async def _call(self, call: Callable[[float], Awaitable[_T]]) -> _T:
        reconnects = Reconnects(_RECONNECTS, _QUICK_S)
        while True:
            try:
                return await call(reconnects.left_s())
            except grpc.aio.AioRpcError as error:
                await reconnects.pause(error)

    async def _follow(
        self, operation: operations_proto_pb2.Operation, response: Message, timeout_s: float
    ) -> AsyncIterator[operations_proto_pb2.Operation]:
        """An operation while it runs; then its response is in `response`, or its error is raised."""
        operations = operations_pb2_grpc.OperationsStub(self._channel)
        reconnects = Reconnects(_RECONNECTS, timeout_s)
        while not operation.done:
            yield operation
            await asyncio.sleep(_POLL_EVERY_S)
            get = operations_proto_pb2.GetOperationRequest(name=operation.name)
            try:
                operation = await operations.GetOperation(get, timeout=min(_QUICK_S, reconnects.left_s()))
                reconnects.progress()
            except grpc.aio.AioRpcError as error:
                await reconnects.pause(error)
        if operation.HasField("error"):
            raise from_status(operation.error)
        if not operation.response.Unpack(response):
            raise Internal("the registry's answer cannot be read; use a client of the registry's release")


async def pages(page: Callable[[str], Awaitable[Any]]) -> AsyncIterator[Any]:
    """Every page of a list; `page` asks for the one behind a token."""
    token = ""
    while True:
        response = await page(token)
        yield response
        token = response.next_page_token
        if not token:
            return

"""What asking a gateway has in common: defaults, and calls that are made again when they are lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from treadle.api.inference.v1 import inference_pb2_grpc
from treadle.client.connection import Connection
from treadle.client.reconnect import Reconnects
from treadle.client.request import GenerationRequest
from treadle.client.task_request import TaskRequest
from treadle.security import Credentials

DEFAULT_ADDRESS = "127.0.0.1:50051"
BATCH_S = 86_400.0
"""How long a whole batch may take, in seconds, unless it is said."""
_T = TypeVar("_T")


class InferenceConnection(Connection):
    """What the areas of the gateway's client have in common."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        model: str = "",
        tenant: str = "",
        timeout_s: float = 600.0,
        reconnects: int = 6,
        credentials: Credentials | None = None,
    ) -> None:
        """`model`, `tenant` and `timeout_s` hold for requests that do not say their own."""
        super().__init__(address, credentials)
        self._model = model
        self._tenant = tenant
        self._timeout_s = timeout_s
        self._reconnects = reconnects

    @property
    def _stub(self) -> inference_pb2_grpc.InferenceServiceStub:
        return inference_pb2_grpc.InferenceServiceStub(self._channel)

    def _timeout_of(self, request: GenerationRequest | TaskRequest) -> float:
        return self._timeout_s if request.timeout_s is None else request.timeout_s

    async def _again_when_lost(self, call: Callable[[float], Awaitable[_T]], timeout_s: float) -> _T:
        reconnects = Reconnects(self._reconnects, timeout_s)
        while True:
            try:
                return await call(reconnects.left_s())
            except grpc.aio.AioRpcError as error:
                await reconnects.pause(error)

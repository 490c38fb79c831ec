"""A gRPC server as every service runs it: health, reflection, error statuses, graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from treadle.errors import Unavailable
from treadle.rpc.channel import MAX_MESSAGE_BYTES
from treadle.rpc.interceptor import CallInterceptor
from treadle.rpc.server_tls import server_credentials
from treadle.security import ServerSecurity
from treadle.security.key_file import KeyFile

if TYPE_CHECKING:
    from treadle.telemetry.service import Telemetry

logger = logging.getLogger(__name__)

LIVENESS = "liveness"
"""The health service's name for: this process can be kept."""
READINESS = ""
"""The health service's name for: work should be sent here."""

_KEYS_EVERY_S = 1.0

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class RpcServer:
    """A server of one service's port.

    It starts live and not ready; `set_ready(True)` when what the service needs is there. `stop` says not
    ready at once, refuses new calls, and lets running ones finish within the grace period.
    """

    def __init__(
        self,
        address: str,
        *,
        security: ServerSecurity | None = None,
        telemetry: Telemetry | None = None,
        maximum_concurrent_rpcs: int = 4096,
    ) -> None:
        self._address = address
        self._security = security or ServerSecurity()
        self._key_watch: asyncio.Task[None] | None = None
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(self._security, telemetry)],
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                # A silent prefill must not end in GOAWAY because its client pings.
                ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
            maximum_concurrent_rpcs=maximum_concurrent_rpcs,
        )
        self._health = health.aio.HealthServicer()
        self._services: list[str] = []
        self._ready = False
        self.port = 0
        """The bound port, once started."""

    def add(
        self, add_to_server: Callable[[Any, grpc.aio.Server], None], servicer: object, service: str
    ) -> None:
        """Adds a servicer by its generated function; `service` is its full name ("treadle.api…")."""
        add_to_server(servicer, self._server)
        self._services.append(service)

    async def start(self) -> None:
        """Binds and serves.

        Raises Unavailable when the address cannot be bound, FailedPrecondition when it would be open to
        strangers or its certificate cannot be used.
        """
        self._security.check_address(self._address)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        await self._health.set(LIVENESS, _SERVING)
        await self.set_ready(False)
        tls = None if self._security.tls is None else server_credentials(self._security.tls)
        try:
            if tls is None:
                self.port = self._server.add_insecure_port(self._address)
            else:
                self.port = self._server.add_secure_port(self._address, tls)
        except RuntimeError as error:
            raise Unavailable(
                f"cannot listen on {self._address}: {error}; is another process using the port?",
                reason="ADDRESS_IN_USE",
            ) from error
        await self._server.start()
        if self._security.keys is not None:
            self._key_watch = asyncio.create_task(_watch(self._security.keys), name="keys")
        logger.info(
            "listening",
            extra={
                "address": self._address,
                "port": self.port,
                "tls": self._security.tls is not None,
                "keys": self._security.keys is not None,
            },
        )

    @property
    def ready(self) -> bool:
        """What readiness says now."""
        return self._ready

    async def set_ready(self, ready: bool) -> None:
        """Says whether work should be sent here, for the port and each of its services."""
        self._ready = ready
        for service in (READINESS, *self._services):
            await self._health.set(service, _SERVING if ready else _NOT_SERVING)

    async def set_live(self, live: bool) -> None:
        """Says whether the process can be kept."""
        await self._health.set(LIVENESS, _SERVING if live else _NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Not ready at once; new calls are refused; running ones have `grace_s` seconds."""
        await self.set_ready(False)
        await self._server.stop(grace_s)
        if self._key_watch is not None:
            self._key_watch.cancel()
            await asyncio.gather(self._key_watch, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def running(self, grace_s: float = 5.0) -> AsyncIterator[RpcServer]:
        """Starts, and stops at the block's end."""
        await self.start()
        try:
            yield self
        finally:
            await self.stop(grace_s)


async def _watch(keys: KeyFile) -> None:
    """Takes new and revoked keys up while the server runs."""
    while True:
        await asyncio.sleep(_KEYS_EVERY_S)
        await asyncio.to_thread(keys.reload_if_changed)

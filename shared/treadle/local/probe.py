"""One quick look at a service: is it ready?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from treadle.rpc import open_channel
from treadle.security import Credentials

LOOK_S = 2.0
"""The longest that one look takes, in seconds."""

Probe = Callable[[], Awaitable[bool]]


async def is_healthy(address: str, service: str = "", credentials: Credentials | None = None) -> bool:
    """What `grpc.health.v1` at "host:port" says of `service`; False when nobody answers."""
    if not await _accepts(address):
        return False
    async with open_channel(address, credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=LOOK_S)
        except grpc.aio.AioRpcError:
            return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def _accepts(address: str) -> bool:
    # A channel that was refused once waits before it tries again; a plain connection is known at once.
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(LOOK_S):
            _, writer = await asyncio.open_connection(host, int(port))
    except (OSError, TimeoutError):
        return False
    writer.close()
    try:
        await writer.wait_closed()
    except OSError:
        return False
    return True


def health_probe(address: str, credentials: Credentials) -> Probe:
    """Looks at the readiness of the gRPC service at `address`."""

    async def look() -> bool:
        return await is_healthy(address, credentials=credentials)

    return look

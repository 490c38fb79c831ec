"""Clients of Redis, and its failures as the suite's errors.

redis-py retries silently by default; here nothing is sent twice behind the caller's back. Every command and
pipeline is bounded in time, the wait for a free connection included.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from treadle.errors import ResourceExhausted, TreadleError, Unavailable

COMMAND_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
RETRY_AFTER_S = 1.0
"""What a client is told to wait while Redis is away."""

P = ParamSpec("P")
T = TypeVar("T")


class BoundedRedis(Redis):
    """A client whose every command and pipeline ends within `timeout_s`, with TimeoutError if need be.

    redis-py's own timeout of a socket goes through `asyncio.wait_for`, which before Python 3.12 swallows a
    cancellation that comes in the moment the write is done: the task then runs on for ever.
    """

    timeout_s: float

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """As Redis does."""
        async with asyncio.timeout(self.timeout_s):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        """As Redis does."""
        pipe = BoundedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipe.timeout_s = self.timeout_s
        return pipe


class BoundedPipeline(Pipeline):
    """A pipeline that ends within `timeout_s`."""

    timeout_s: float

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """As Pipeline does."""
        async with asyncio.timeout(self.timeout_s):
            return await super().execute(raise_on_error)


def connect(url: str, *, max_connections: int = 16) -> Redis:
    """A client for commands; at most `max_connections` run at once, further ones wait for their turn."""
    return _client(url, max_connections, COMMAND_TIMEOUT_S)


def connect_blocking(url: str, *, block_s: float, max_connections: int = 2) -> Redis:
    """A client for reads that block up to `block_s` seconds: they must not time out, nor starve commands."""
    return _client(url, max_connections, block_s + COMMAND_TIMEOUT_S)


def _client(url: str, max_connections: int, timeout_s: float) -> Redis:
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=None,
        socket_timeout=None,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        # With these on, redis-py gives out a connection whose other end is gone, for RESP3 may push.
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )
    client = BoundedRedis(connection_pool=pool)
    client.auto_close_connection_pool = True
    client.timeout_s = timeout_s
    return client


def as_treadle_error(error: exceptions.RedisError | OSError | TimeoutError) -> TreadleError | None:
    """What the error means to a client; None for a fault of our own, such as a wrong command."""
    if isinstance(error, exceptions.OutOfMemoryError):
        return ResourceExhausted(
            "Redis is full; try again later", reason="REDIS_FULL", retry_after_s=RETRY_AFTER_S
        )
    if isinstance(error, exceptions.ResponseError) and not isinstance(error, _PASSING):
        return None
    return Unavailable("Redis is away; try again", reason="REDIS_UNAVAILABLE", retry_after_s=RETRY_AFTER_S)


_PASSING = (exceptions.ReadOnlyError, exceptions.MasterDownError, exceptions.TryAgainError)


def redis_errors(function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Decorates a coroutine function: Redis's failures come out as Unavailable or ResourceExhausted."""

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await function(*args, **kwargs)
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            meant = as_treadle_error(error)
            if meant is None:
                raise
            raise meant from error

    return call

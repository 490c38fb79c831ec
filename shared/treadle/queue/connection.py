"""Clients of Redis, and its failures as the suite's errors.

redis-py retries silently by default; here nothing is sent twice behind the caller's back. Every command and
pipeline is bounded in time, and travels on a line that many share, or on one of its own if it blocks.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from treadle.errors import ResourceExhausted, TreadleError, Unavailable
from treadle.queue.line import Command, Line

COMMAND_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
RETRY_AFTER_S = 1.0
"""What a client is told to wait while Redis is away."""

P = ParamSpec("P")
T = TypeVar("T")


class Lines:
    """The lines of one client: one that all its callers share, or one for each that waits."""

    def __init__(self, pool: ConnectionPool, timeout_s: float, *, shared: bool) -> None:
        self._pool = pool
        self.timeout_s = timeout_s
        """For a call on a line that is opened from now on, and for opening it."""
        self._shared = shared
        self._lines: list[Line] = []
        self._opening: asyncio.Task[Line] | None = None

    async def call(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to some commands, errors among them; raises RedisError where Redis is away."""
        self._lines = [line for line in self._lines if line.lost is None]
        line = next((line for line in self._lines if self._shared or line.idle), None)
        if line is not None:
            replies = line.send(commands)
        elif self._shared:
            line = await self._open()
            replies = line.send(commands)
        else:
            line = await self._new_line()
            # Nobody else may find it idle.
            replies = line.send(commands)
            self._lines.append(line)
        try:
            found = await replies
        except asyncio.CancelledError:
            if not self._shared:
                # What it still waits for must not be given to nobody.
                line.close()
            raise
        for reply in found:
            # Such as LOADING: nothing that was sent has been done.
            if isinstance(reply, exceptions.ConnectionError):
                raise reply
        return found

    async def _open(self) -> Line:
        """The line that is being opened, for all who want one meanwhile."""
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open_shared(), name="redis-open")
            self._opening.add_done_callback(_seen)
        return await asyncio.shield(self._opening)

    async def _open_shared(self) -> Line:
        line = await self._new_line()
        # Before the task is done: whoever comes next must find it.
        self._lines.append(line)
        return line

    async def _new_line(self) -> Line:
        connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        return await Line.open(connection, self.timeout_s)

    async def close(self) -> None:
        """Closes them all."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        for line in self._lines:
            line.close()
        # The loop lets go of their sockets in its next turn.
        await asyncio.sleep(0)


def _seen(opening: asyncio.Task[Line]) -> None:
    """Of a failure that nobody waits for any more, asyncio would complain."""
    if not opening.cancelled():
        opening.exception()


class LineRedis(Redis):
    """A client whose commands and pipelines travel on lines, each bounded in time."""

    lines: Lines

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """As Redis does."""
        (reply,) = await self.lines.call([args])
        if isinstance(reply, Exception):
            raise reply
        return _read(self.response_callbacks, args, reply, options)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        """As Redis does; there are no transactions here."""
        pipe = LinePipeline(self.connection_pool, self.response_callbacks, False, shard_hint)
        pipe.lines = self.lines
        return pipe

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """As Redis does."""
        await self.lines.close()
        await super().aclose(close_connection_pool)


class LinePipeline(Pipeline):
    """Commands that travel together."""

    lines: Lines

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """As Pipeline does."""
        stack, self.command_stack = self.command_stack, []
        if not stack:
            return []
        found = []
        replies = await self.lines.call([args for args, _ in stack])
        for (args, options), reply in zip(stack, replies, strict=True):
            if not isinstance(reply, Exception):
                found.append(_read(self.response_callbacks, args, reply, options))
            elif raise_on_error:
                raise reply
            else:
                found.append(reply)
        return found


def _read(callbacks: Mapping[Any, Any], args: Command, reply: Any, options: Mapping[str, Any]) -> Any:
    """The reply as redis-py gives it to the caller of a command."""
    if (callback := callbacks.get(args[0])) is None:
        return reply
    return callback(reply, **{name: value for name, value in options.items() if name != "keys"})


def connect(url: str) -> Redis:
    """A client for commands, which all travel on one connection."""
    return _client(url, COMMAND_TIMEOUT_S, shared=True)


def connect_blocking(url: str, *, block_s: float) -> Redis:
    """A client for reads that block up to `block_s` seconds, each on a connection of its own meanwhile."""
    return _client(url, block_s + COMMAND_TIMEOUT_S, shared=False)


def _client(url: str, timeout_s: float, *, shared: bool) -> Redis:
    pool = ConnectionPool.from_url(
        url,
        socket_timeout=None,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )
    client = LineRedis(connection_pool=pool)
    client.auto_close_connection_pool = True
    client.lines = Lines(pool, timeout_s, shared=shared)
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

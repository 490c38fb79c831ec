"""One connection to Redis that carries the commands of many callers at once.

redis-py gives each command a connection of its own, with a pool, locks and a stream reader around it, and
that costs several times what the command does. Here commands are written as they come, those of one turn of
the event loop together, and replies are handed out in the same order. redis-py still opens the connection:
addresses, TLS, passwords and the protocol's version are its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import hiredis
from redis import exceptions
from redis._parsers import BaseParser
from redis.asyncio.connection import AbstractConnection

_NOT_YET = object()

Command = Sequence[Any]
"""A command's name and arguments: str, bytes, int or float."""


def packed(command: Command) -> bytes:
    """The command as bytes; its name may have several words."""
    name, *arguments = command
    try:
        return bytes(hiredis.pack_command((*name.encode().split(), *arguments)))
    except TypeError as error:
        raise exceptions.DataError(f"a command's argument is of no type that Redis knows: {error}") from error


@dataclass(slots=True)
class _Call:
    replies: asyncio.Future[list[Any]]
    num_commands: int
    due: float


class Line(asyncio.Protocol):
    """An open connection; it is lost once, and then for good.

    A call that gets no reply in time takes the line with it: whatever was sent behind it would wait as well.
    """

    def __init__(self, connection: AbstractConnection, timeout_s: float) -> None:
        """`connection` is open, and this line's alone from now on."""
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._reader = hiredis.Reader(
            protocolError=exceptions.InvalidResponse,
            replyError=cast(Any, BaseParser.parse_error),
            notEnoughData=_NOT_YET,
        )
        self._calls: deque[_Call] = deque()
        self._replies: list[Any] = []
        """To the first of the calls, as far as they have come."""
        self._outbox: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self.lost: exceptions.RedisError | None = None
        """Why the line is of no use any more."""
        # The streams are kept: one that is collected closes the transport.
        self._streams = connection._reader, connection._writer
        connection._reader = connection._writer = None
        writer = self._streams[1]
        assert writer is not None, "the connection is open"
        self._transport = cast(asyncio.Transport, writer.transport)
        self._transport.set_protocol(self)

    @classmethod
    async def open(cls, connection: AbstractConnection, timeout_s: float) -> Line:
        """Connects, within `timeout_s`; calls on the line are bounded by as much. Raises RedisError."""
        try:
            async with asyncio.timeout(timeout_s):
                await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if isinstance(error, TimeoutError):
                raise exceptions.TimeoutError("Redis did not let us in in time") from error
            raise
        return cls(connection, timeout_s)

    @property
    def idle(self) -> bool:
        """Whether no call waits for replies."""
        return not self._calls

    def send(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Sends the commands behind one another; their replies come together, errors among them.

        The future fails with the line. Who waits no longer may cancel it.
        """
        if self.lost is not None:
            raise type(self.lost)(*self.lost.args)
        call = _Call(self._loop.create_future(), len(commands), self._loop.time() + self._timeout_s)
        data = b"".join(map(packed, commands))
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(data)
        self._calls.append(call)
        if self._timer is None:
            self._timer = self._loop.call_at(call.due, self._look)
        return call.replies

    def close(self) -> None:
        """Ends the line, and every call on it."""
        self._lose(exceptions.ConnectionError("the connection to Redis was closed"))

    def _flush(self) -> None:
        data, self._outbox = b"".join(self._outbox), []
        if self.lost is None:
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        """Hands out the replies that have come."""
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _NOT_YET:
                if not isinstance(reply, hiredis.PushNotification):
                    self._take(reply)
        except exceptions.RedisError as error:
            self._lose(error)

    def _take(self, reply: Any) -> None:
        if not self._calls:
            raise exceptions.InvalidResponse("Redis answered what nobody had asked")
        self._replies.append(reply)
        if len(self._replies) == self._calls[0].num_commands:
            call = self._calls.popleft()
            replies, self._replies = self._replies, []
            if not call.replies.done():
                call.replies.set_result(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fails whoever waits."""
        self._lose(exceptions.ConnectionError(f"the connection to Redis was lost: {exc or 'it was closed'}"))

    def _look(self) -> None:
        self._timer = None
        if not self._calls:
            return
        due = self._calls[0].due
        if due <= self._loop.time():
            self._lose(exceptions.TimeoutError(f"Redis said nothing for {self._timeout_s:.0f} s"))
        else:
            self._timer = self._loop.call_at(due, self._look)

    def _lose(self, error: exceptions.RedisError) -> None:
        if self.lost is not None:
            return
        self.lost = error
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        while self._calls:
            call = self._calls.popleft()
            if not call.replies.done():
                # A fresh one each: an exception that several tasks raise gathers their tracebacks.
                call.replies.set_exception(type(error)(*error.args))

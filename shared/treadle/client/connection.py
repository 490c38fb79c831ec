"""A client's channel: opened by its first call, closed with the client."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import grpc

from treadle.rpc import open_channel
from treadle.security import Credentials


class Connection:
    """What every asynchronous client is: an address, a channel, and a block of `async with`."""

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        self.address = address
        """ "host:port"."""
        self._credentials = credentials
        self._opened: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; what still runs on it ends."""
        channel, self._opened = self._opened, None
        if channel is not None:
            await channel.close()

    @property
    def _channel(self) -> grpc.aio.Channel:
        # It belongs to the loop that runs when it is made: the first call's.
        if self._opened is None:
            self._opened = open_channel(self.address, self._credentials)
        return self._opened

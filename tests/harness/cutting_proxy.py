"""A network that breaks: a TCP proxy whose connections are cut after so many bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class CuttingProxy:
    """Passes bytes on to a port; connection number n is reset after `cuts[n]` bytes of the other side's.

    Connections beyond `cuts` are left alone. One that `stalls` stays open instead, and passes no more.
    """

    def __init__(self, target_port: int, cuts: list[int], *, stalls: bool = False) -> None:
        self.num_cut = 0
        self.port = 0
        self._target_port = target_port
        self._cuts = list(cuts)
        self._stalls = stalls

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[CuttingProxy]:
        """Listens on a loopback port until the block's end."""
        self._connections: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        limit = self._cuts.pop(0) if self._cuts else None
        target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        up = asyncio.create_task(_pass_on(reader, target_writer, None))
        down = asyncio.create_task(_pass_on(target_reader, writer, limit))
        try:
            done, _ = await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            cut = down in done and limit is not None and down.result()
            self.num_cut += cut
            if cut and self._stalls:
                await up
        finally:
            for side in (up, down):
                side.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            for end in (writer, target_writer):
                end.transport.abort()
            self._connections.discard(task)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None) -> bool:
    """Until the stream's end, or so many bytes; True at the limit."""
    passed = 0
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            if limit is not None and passed + len(data) >= limit:
                writer.write(data[: limit - passed])
                await writer.drain()
                return True
            passed += len(data)
            writer.write(data)
            await writer.drain()
    return False

"""The I/O process's end of one engine process: starts it, sends commands, reads events, sees it die.

No torch here: the engine lives in the child alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from treadle.errors import Unavailable
from treadle_worker.config import EngineConfig
from treadle_worker.engine_protocol import (
    EngineCommand,
    EngineCommands,
    EngineEvent,
    EngineStart,
    Failed,
    Shutdown,
)
from treadle_worker.framing import encode_frame, read_frame

_log = logging.getLogger(__name__)
_EXIT_TIMEOUT_S = 5.0
"""From the channel's end to the process's: it has nothing left to do."""


OPENMP_SPINS = "1000"
"""How often a thread of the engine looks for work before it sleeps. The default, some milliseconds, takes
the core from the services that the engine waits for: a step took twenty times as long on a busy machine."""


class EngineClient:
    """One engine process.

    Events are read straight from the socket when they are asked for: a reader that is slow makes the
    engine wait, and nothing piles up here. One task at a time may iterate over `events`.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._stopping = False

    @classmethod
    async def start(cls, model_folder: Path, config: EngineConfig) -> EngineClient:
        """Starts a process that loads the folder's model; `events` tells when it is Ready.

        The child dies with the thread that calls this: call it from the event loop of the main thread.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "treadle_worker.engine_process"),
                *("--fd", str(theirs.fileno()), "--parent", str(os.getpid())),
                pass_fds=[theirs.fileno()],
                env={"GOMP_SPINCOUNT": OPENMP_SPINS} | os.environ,
                stdin=asyncio.subprocess.DEVNULL,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        client = cls(process, reader, writer)
        settings = EngineStart(model_folder=str(model_folder), **config.model_dump())
        await client._write(msgspec.msgpack.encode(settings))
        return client

    @property
    def process_id(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    async def send(self, commands: Sequence[EngineCommand]) -> None:
        """Sends the commands as one message, and waits while the channel is full.

        Raises Unavailable where the engine is gone.
        """
        await self._write(msgspec.msgpack.encode(EngineCommands(commands=list(commands))))

    async def events(self) -> AsyncIterator[EngineEvent]:
        """What the engine says, in order; ends with the engine.

        An engine that ends without being stopped says Failed last: the process itself if it could, else
        this end in its name.
        """
        decoder: msgspec.msgpack.Decoder[EngineEvent] = msgspec.msgpack.Decoder(EngineEvent)
        failed = False
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                event = decoder.decode(await read_frame(self._reader))
                failed = isinstance(event, Failed)
                yield event
        if not failed and not self._stopping:
            code = await self._reap(_EXIT_TIMEOUT_S)
            yield Failed(message=f"the engine process {self.process_id} ended with exit code {code}")

    async def wait_closed(self) -> int:
        """Waits for the process's end; returns its exit code, negative for a signal."""
        code = await self._process.wait()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        return code

    async def stop(self, timeout_s: float = 5.0) -> int:
        """Asks the process to end after its step, and kills it if that takes too long.

        Returns the exit code. Safe to call again, and for an engine that is dead already.
        """
        self._stopping = True
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(timeout_s / 2):
                await self.send([Shutdown()])
        self._writer.close()
        await self._reap(timeout_s / 2)
        return await self.wait_closed()

    async def _reap(self, timeout_s: float) -> int:
        """The exit code of a process that should end by itself within the time; it is killed if not."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._process.wait()
        except TimeoutError:
            _log.warning("the engine is killed", extra={"engine_pid": self.process_id})
            self._process.kill()
            return await self._process.wait()

    async def _write(self, message: bytes) -> None:
        try:
            self._writer.write(encode_frame(message))
            await self._writer.drain()
        except ConnectionError as error:
            raise Unavailable("the engine is gone", reason="ENGINE_GONE") from error

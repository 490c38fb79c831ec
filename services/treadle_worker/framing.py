"""MessagePack messages over a socket pair: four bytes of length (big-endian), then the message.

The engine's end is FrameSocket, which is synchronous; the I/O process reads and writes the same frames on
asyncio streams.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct

MAX_FRAME_BYTES = 1 << 28
"""A longer frame is not ours: the other end is broken."""
_HEADER = struct.Struct(">I")
_RECEIVE_BYTES = 1 << 18


def encode_frame(message: bytes) -> bytes:
    """The message with its length before it."""
    if len(message) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(message)} bytes is longer than {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(message)) + message


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next message. Raises asyncio.IncompleteReadError at the end, ValueError for a broken length."""
    return await reader.readexactly(_length(await reader.readexactly(_HEADER.size)))


def _length(header: bytes | bytearray) -> int:
    (length,) = _HEADER.unpack_from(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is longer than {MAX_FRAME_BYTES}")
    return int(length)


class FrameSocket:
    """The engine's end of the pair.

    While it waits to write it goes on reading, so that two ends that both write can never wait for each
    other. What it then holds is bounded by what the I/O process claims.
    """

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(False)
        self._channel = channel
        self._buffer = bytearray()
        self._ended = False

    def send(self, message: bytes) -> None:
        """Writes one message, and waits as long as the other end is slow.

        Raises ConnectionError when it is gone.
        """
        rest = memoryview(encode_frame(message))
        while rest:
            try:
                rest = rest[self._channel.send(rest) :]
            except BlockingIOError:
                readers = [] if self._ended else [self._channel]
                readable, _, _ = select.select(readers, [self._channel], [])
                if readable:
                    self._fill()

    def receive(self, timeout_s: float | None = 0.0) -> list[bytes]:
        """All whole messages that have come; waits for the first up to `timeout_s` (None: for ever).

        Raises EOFError once the other end has closed and everything was returned.
        """
        self._fill()
        while not (messages := self._take_messages()):
            if self._ended:
                raise EOFError("the other end closed the channel")
            if not select.select([self._channel], [], [], timeout_s)[0]:
                break
            self._fill()
        return messages

    def _fill(self) -> None:
        while not self._ended:
            try:
                data = self._channel.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            self._buffer += data
            self._ended = not data

    def _take_messages(self) -> list[bytes]:
        messages, start = [], 0
        while len(self._buffer) - start >= _HEADER.size:
            end = start + _HEADER.size + _length(self._buffer[start : start + _HEADER.size])
            if len(self._buffer) < end:
                break
            messages.append(bytes(self._buffer[start + _HEADER.size : end]))
            start = end
        del self._buffer[:start]
        return messages

"""Frames over a real socket pair: in pieces, large, both ways at once, to the end."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from treadle_worker.framing import MAX_FRAME_BYTES, FrameSocket, encode_frame, read_frame


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_frames_come_whole_however_they_are_cut(pair):
    ours, theirs = pair
    frames = FrameSocket(theirs)
    assert frames.receive() == []
    data = encode_frame(b"first") + encode_frame(b"") + encode_frame(b"x" * 1000)
    got: list[bytes] = []
    for start in range(0, len(data), 7):
        ours.sendall(data[start : start + 7])
        got += frames.receive()
    assert got == [b"first", b"", b"x" * 1000]


def test_the_end_comes_after_everything_that_was_sent(pair):
    ours, theirs = pair
    frames = FrameSocket(theirs)
    ours.sendall(encode_frame(b"last") + b"\x00")
    ours.close()
    assert frames.receive(None) == [b"last"]
    with pytest.raises(EOFError):
        frames.receive(None)
    with pytest.raises(ConnectionError):
        frames.send(b"too late")


def test_two_ends_that_both_write_do_not_wait_for_each_other(pair):
    """Each message is far longer than the socket's buffers, and neither end reads before it has written."""
    ends = [FrameSocket(end) for end in pair]
    got: dict[int, list[bytes]] = {0: [], 1: []}

    def talk(index: int) -> None:
        for number in range(3):
            ends[index].send(bytes([number]) * 3_000_000)
        while len(got[index]) < 3:
            got[index] += ends[index].receive(None)

    threads = [threading.Thread(target=talk, args=(index,), daemon=True) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert got[0] == got[1] == [bytes([number]) * 3_000_000 for number in range(3)]


def test_an_impossible_length_is_refused(pair):
    ours, theirs = pair
    ours.sendall((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ValueError, match="longer"):
        FrameSocket(theirs).receive(None)


async def test_streams_read_the_same_frames(pair):
    ours, theirs = pair
    reader, writer = await asyncio.open_connection(sock=ours)
    message = bytes(range(256)) * 10_000
    sending = asyncio.create_task(asyncio.to_thread(FrameSocket(theirs).send, message))
    assert await read_frame(reader) == message
    await sending
    theirs.close()
    with pytest.raises(asyncio.IncompleteReadError):
        await read_frame(reader)
    writer.close()

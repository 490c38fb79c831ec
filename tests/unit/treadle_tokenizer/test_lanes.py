"""Threads: large work holds up its like only, and what waits is bounded."""

from __future__ import annotations

import asyncio
import threading

import pytest

from treadle.errors import ResourceExhausted
from treadle_tokenizer.lanes import Lanes, Piece


async def test_large_work_holds_up_its_like_only() -> None:
    lanes = Lanes(threads=2, large_bytes=100, max_waiting=8, max_waiting_large=8)
    released = threading.Event()
    large = [asyncio.create_task(lanes.run(released.wait, size=100)) for _ in range(3)]
    await asyncio.sleep(0)
    small = [await lanes.run(threading.current_thread, size=99) for _ in range(20)]
    assert not any(task.done() for task in large)
    assert {thread.name.rsplit("_", 1)[0] for thread in small} == {"tokenizer"}
    released.set()
    assert await asyncio.gather(*large) == [True] * 3
    lanes.close()


async def test_what_waits_is_bounded() -> None:
    lanes = Lanes(threads=1, large_bytes=100, max_waiting=2, max_waiting_large=2)
    released = threading.Event()
    held = [asyncio.create_task(lanes.run(released.wait, size=1)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted) as caught:
        await lanes.run(released.wait, size=1)
    assert caught.value.retry_after_s
    # A caller that leaves gives its place back.
    held[2].cancel()
    await asyncio.gather(held[2], return_exceptions=True)
    await asyncio.sleep(0)
    again = asyncio.create_task(lanes.run(released.wait, size=1))
    await asyncio.sleep(0)
    released.set()
    assert await asyncio.gather(held[0], held[1], again) == [True] * 3
    lanes.close()


async def test_errors_come_back() -> None:
    lanes = Lanes(threads=1, large_bytes=100, max_waiting=1, max_waiting_large=1)

    def fail() -> None:
        raise KeyError("x")

    for _ in range(5):
        with pytest.raises(KeyError):
            await lanes.run(fail, size=1)
    lanes.close()


async def test_a_request_of_many_pieces_takes_turns_with_others() -> None:
    lanes = Lanes(threads=2, large_bytes=100, max_waiting=4, max_waiting_large=4)
    done: list[int] = []
    begun, released = threading.Event(), threading.Event()

    def piece(number: int) -> int:
        if number == 3:
            begun.set()
            released.wait(30)
        done.append(number)
        return number

    pieces = [Piece(lambda number=number: piece(number), 1) for number in range(50)]
    many = asyncio.create_task(lanes.run_all(pieces))
    await asyncio.to_thread(begun.wait, 30)
    # More pieces than may wait: they do not wait all at once, and others come between.
    others = [await lanes.run(lambda: 7, size=1) for _ in range(4)]
    assert others == [7] * 4
    released.set()
    assert await many == list(range(50))
    assert sorted(done) == list(range(50))
    lanes.close()


async def test_large_and_ordinary_pieces_of_one_request() -> None:
    lanes = Lanes(threads=2, large_bytes=100, max_waiting=4, max_waiting_large=4)

    def lane() -> str:
        return threading.current_thread().name.rsplit("_", 1)[0]

    names = await lanes.run_all([Piece(lane, size) for size in (1, 100, 99, 5000)])
    assert names == ["tokenizer", "tokenizer-large"] * 2
    lanes.close()


async def test_the_first_error_ends_the_other_pieces() -> None:
    lanes = Lanes(threads=1, large_bytes=100, max_waiting=4, max_waiting_large=4)
    done = []

    def piece(number: int) -> None:
        if number == 2:
            raise KeyError(number)
        done.append(number)

    with pytest.raises(KeyError):
        await lanes.run_all([Piece(lambda number=number: piece(number), 1) for number in range(9)])
    assert done == [0, 1]
    assert await lanes.run(lambda: 1, size=1) == 1
    lanes.close()

"""An ordered stream: answers in the order of the items, so many at once, nothing left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from treadle_gateway.batch import Batch


class Source:
    """Counts how many items were read."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, 0

    async def items(self) -> AsyncIterator[int]:
        while self.read < self.count:
            self.read += 1
            yield self.read - 1


async def test_the_order_is_kept_while_later_items_are_ready_first(rng: random.Random):
    running, most, ended = 0, 0, []
    turns = {number: rng.randrange(6) for number in range(300)}

    async def answer(index: int, item: int) -> int:
        nonlocal running, most
        assert index == item
        running += 1
        most = max(most, running)
        for _ in range(turns[item]):
            await asyncio.sleep(0)
        running -= 1
        ended.append(item)
        return item

    batch = Batch(Source(300).items(), answer, limit=7, ordered=True)
    assert [item async for item in batch.answers()] == list(range(300))
    overtaken = sum(other < one for one, other in pairwise(ended))
    assert overtaken > 10
    assert 2 < most <= 7
    print(f"{overtaken} of 300 were ready after one behind them; at most {most} ran at once")


async def test_what_is_ready_before_its_turn_counts_among_the_limit():
    source, first = Source(100), asyncio.Event()
    ready: list[int] = []

    async def answer(index: int, item: int) -> int:
        if item == 0:
            await first.wait()
        ready.append(item)
        return item

    answers = Batch(source.items(), answer, limit=5, ordered=True).answers()
    reading = asyncio.ensure_future(anext(answers))
    for _ in range(200):
        await asyncio.sleep(0)
    assert sorted(ready) == [1, 2, 3, 4]
    assert source.read == 5
    first.set()
    assert await reading == 0
    assert [item async for item in answers] == list(range(1, 100))
    print(f"{source.read} items, 5 read while the first one ran")


async def test_a_client_that_does_not_read_holds_reading_back():
    source = Source(100)

    async def answer(index: int, item: int) -> int:
        return item

    answers = Batch(source.items(), answer, limit=4, ordered=True).answers()
    assert await anext(answers) == 0
    for _ in range(200):
        await asyncio.sleep(0)
    assert 1 <= source.read <= 5
    assert [item async for item in answers] == list(range(1, 100))


async def test_closing_cancels_what_runs():
    cancelled = 0

    async def answer(index: int, item: int) -> int:
        nonlocal cancelled
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled += 1
            raise
        return item

    reading = asyncio.create_task(anext(Batch(Source(100).items(), answer, limit=4, ordered=True).answers()))
    for _ in range(200):
        await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    for _ in range(5):
        await asyncio.sleep(0)
    assert cancelled == 4
    print(f"{cancelled} were cancelled")

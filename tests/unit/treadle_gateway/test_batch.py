"""The batch: bounded, in the order of readiness, nothing left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

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


async def test_every_item_is_answered_once_and_no_more_run_than_allowed():
    rng, running, most = random.Random(1), 0, 0

    async def answer(index: int, item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        assert index == item
        await asyncio.sleep(rng.choice((0, 0.001, 0.003)))
        running -= 1
        return item

    batch = Batch(Source(200).items(), answer, limit=7)
    answers = [item async for item in batch.answers()]
    assert sorted(answers) == list(range(200))
    assert most == 7
    assert answers != sorted(answers)


async def test_a_client_that_does_not_read_holds_reading_back():
    source = Source(100)

    async def answer(index: int, item: int) -> int:
        return item

    answers = Batch(source.items(), answer, limit=4).answers()
    assert await anext(answers) in range(4)
    await asyncio.sleep(0.05)
    assert 1 <= source.read <= 5
    assert len({0} | {item async for item in answers}) >= 99
    assert source.read == 100


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

    batch = Batch(Source(100).items(), answer, limit=4)
    reading = asyncio.create_task(anext(batch.answers()))
    await asyncio.sleep(0.05)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert cancelled == 4


async def test_a_source_that_fails_ends_the_batch():
    async def items() -> AsyncIterator[int]:
        yield 1
        raise ZeroDivisionError

    async def answer(index: int, item: int) -> int:
        await asyncio.sleep(60)
        return item

    with pytest.raises(ZeroDivisionError):
        [item async for item in Batch(items(), answer, limit=4).answers()]

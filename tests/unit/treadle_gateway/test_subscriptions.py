"""Subscriptions: read when asked, nothing held, nothing missed."""

from __future__ import annotations

import asyncio

import pytest

from treadle.api.worker.v1.queue_pb2 import StreamEntry
from treadle.errors import Unavailable
from treadle.queue.keys import RequestKeys
from treadle.queue.log import READ_LIMIT, EntryId, Log, LogEntry
from treadle_gateway.subscriptions import Subscriptions

REQUEST = RequestKeys("default", "r1")


def log(first: int, count: int, *, exists: bool = True) -> Log:
    return Log(
        exists, [LogEntry(EntryId(1, number), StreamEntry()) for number in range(first, first + count)]
    )


@pytest.fixture
def wakes() -> list[int]:
    return []


@pytest.fixture
def subscriptions() -> Subscriptions:
    return Subscriptions()


async def test_entries_are_read_only_for_a_client_that_waits(subscriptions, wakes):
    one = subscriptions.add(REQUEST, lambda: wakes.append(1))
    assert not one.wants_reading
    waiting = asyncio.create_task(one.next())
    await asyncio.sleep(0)
    assert one.wants_reading
    assert len(wakes) == 1
    one.begin_reading()
    one.give(log(1, 0))
    assert not one.wants_reading
    one.mark()
    assert one.wants_reading
    one.begin_reading()
    one.give(log(0, 3))
    assert [entry.id.number for entry in await waiting] == [0, 1, 2]
    assert one.after == EntryId(1, 2)
    one.mark()
    assert not one.wants_reading


async def test_entries_that_come_twice_are_dropped_and_none_are_lost(subscriptions, wakes):
    one = subscriptions.add(REQUEST, lambda: wakes.append(1), EntryId(1, 5))
    waiting = asyncio.create_task(one.next())
    await asyncio.sleep(0)
    one.begin_reading()
    one.give(log(3, 5))
    one.give(log(3, 6))
    assert [entry.id.number for entry in await waiting] == [6, 7]
    waiting = asyncio.create_task(one.next())
    await asyncio.sleep(0)
    assert one.wants_reading, "what was found while nobody waited is read again"
    waiting.cancel()


async def test_a_read_that_stopped_at_its_limit_goes_on(subscriptions, wakes):
    one = subscriptions.add(REQUEST, lambda: wakes.append(1))
    waiting = asyncio.create_task(one.next())
    await asyncio.sleep(0)
    one.begin_reading()
    one.give(log(1, READ_LIMIT))
    assert len(await waiting) == READ_LIMIT
    waiting = asyncio.create_task(one.next())
    await asyncio.sleep(0)
    assert one.wants_reading
    waiting.cancel()


async def test_a_log_that_is_gone_fails_the_wait(subscriptions, wakes):
    one = subscriptions.add(REQUEST, lambda: wakes.append(1))
    waiting = asyncio.create_task(one.next())
    await asyncio.sleep(0)
    one.give(log(0, 0, exists=False))
    with pytest.raises(Unavailable, match="send the request again"):
        await waiting


def test_the_table_forgets(subscriptions):
    first, second = [subscriptions.add(REQUEST, lambda: None) for _ in range(2)]
    other = subscriptions.add(RequestKeys("default", "r2"), lambda: None)
    assert set(subscriptions.of([REQUEST])) == {first, second}
    assert len(subscriptions) == len(list(subscriptions)) == 3
    assert subscriptions.remove(first) == 1
    assert subscriptions.remove(second) == subscriptions.remove(second) == 0
    assert subscriptions.requests == [other.request]
    assert list(subscriptions.of([REQUEST])) == []

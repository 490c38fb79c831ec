"""Subscriptions: read when asked, nothing held, nothing missed."""

from __future__ import annotations

import asyncio
import random

import pytest

from treadle.api.worker.v1.queue_pb2 import StreamEntry
from treadle.errors import Unavailable
from treadle.queue.dirty import News
from treadle.queue.keys import RequestKeys
from treadle.queue.log import READ_LIMIT, EntryId, Log, LogEntry
from treadle_gateway.subscriptions import MAX_HELD, Subscription, Subscriptions

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


def heard(number: int, *, epoch: int = 1, previous: EntryId | None = None) -> News:
    id_ = EntryId(epoch, number)
    return News(REQUEST, LogEntry(id_, StreamEntry()), previous or EntryId(epoch, number - 1))


async def taken(one: Subscription) -> list[tuple[int, int]]:
    return [tuple(entry.id) for entry in await one.next()]


async def test_entries_that_come_with_news_need_no_read(subscriptions, wakes):
    one = subscriptions.add(REQUEST, lambda: wakes.append(1), EntryId(0, 1), news=False)
    waiting = asyncio.create_task(taken(one))
    await asyncio.sleep(0)
    one.hear(heard(1, previous=EntryId(0, 1)))
    assert await waiting == [(1, 1)]
    one.hear(heard(2))
    one.hear(heard(3))
    one.hear(heard(2))
    assert await taken(one) == [(1, 2), (1, 3)]
    # Another owner: its fence lies between.
    one.hear(heard(1, epoch=4, previous=EntryId(1, 3)))
    assert await taken(one) == [(4, 1)]
    assert not wakes
    assert not one.wants_reading


async def test_a_gap_a_pile_and_news_without_an_entry_lead_to_the_log(subscriptions, wakes):
    one = subscriptions.add(REQUEST, lambda: wakes.append(1), EntryId(1, 0), news=False)
    for number in range(1, MAX_HELD + 3):
        one.hear(heard(number))
    assert await taken(one) == [(1, number) for number in range(1, MAX_HELD + 1)]
    for news in (heard(MAX_HELD + 2), News(REQUEST)):
        one.begin_reading()
        waiting = asyncio.create_task(taken(one))
        await asyncio.sleep(0)
        assert not one.wants_reading
        one.hear(news)
        assert one.wants_reading
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_whatever_is_missed_each_entry_is_handed_out_once_and_in_order(subscriptions):
    """News are lost, doubled and late, reads come at any time, and the client is slow at times."""
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    got, reads = 0, 0
    for _ in range(200):
        one = subscriptions.add(REQUEST, lambda: None, EntryId(1, 0), news=False)
        written, out, late, waiting = 0, [], [], None
        while len(out) < 30:
            if written < 30:
                written += 1
                late += [heard(written)] * rng.choice([0, 1, 1, 1, 2])
            while late and rng.random() < 0.7:
                one.hear(late.pop(0))
            if written == 30 and not late:
                one.mark()  # the sweep
            if waiting is None and rng.random() < 0.6:
                waiting = asyncio.create_task(taken(one))
            await asyncio.sleep(0)
            if one.wants_reading:
                one.begin_reading()
                one.give(log(1, written))
                reads += 1
                await asyncio.sleep(0)
            if waiting is not None and waiting.done():
                out += waiting.result()
                waiting = None
        assert out == [(1, number) for number in range(1, 31)], seed
        got += len(out)
        subscriptions.remove(one)
    assert reads
    print(f"{got} entries in their order with {reads} reads, seed {seed}")


def test_the_table_forgets(subscriptions):
    first, second = [subscriptions.add(REQUEST, lambda: None) for _ in range(2)]
    other = subscriptions.add(RequestKeys("default", "r2"), lambda: None)
    assert set(subscriptions.of([REQUEST])) == {first, second}
    assert len(subscriptions) == len(list(subscriptions)) == 3
    assert subscriptions.remove(first) == 1
    assert subscriptions.remove(second) == subscriptions.remove(second) == 0
    assert subscriptions.requests == [other.request]
    assert list(subscriptions.of([REQUEST])) == []

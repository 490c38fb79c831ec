"""The follower while Redis is away: waits go on for a while, then they end, and later ones work again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from treadle.api.worker.v1.queue_pb2 import StreamEntry
from treadle.errors import Unavailable
from treadle.queue.keys import RequestKeys
from treadle.queue.log import EntryId, Log, LogEntry
from treadle_gateway import log_follower
from treadle_gateway.log_follower import LogFollower

REQUEST = RequestKeys("default", "r1")


class StubRedis:
    """What the follower's functions of the queue would find."""

    def __init__(self) -> None:
        self.away = False
        self.rounds: list[dict[RequestKeys, EntryId]] = []

    async def read_logs(self, redis, after):
        self.rounds.append(dict(after))
        if self.away:
            raise Unavailable("away", reason="REDIS_UNAVAILABLE", retry_after_s=1.0)
        entries = [LogEntry(EntryId(1, number), StreamEntry()) for number in range(4)]
        return {keys: Log(True, [one for one in entries if one.id > last]) for keys, last in after.items()}

    async def pop(self, redis, gateway_id, *, block_s):
        await asyncio.sleep(0.01)
        return []


@pytest.fixture
def redis(monkeypatch) -> StubRedis:
    stub = StubRedis()
    monkeypatch.setattr(log_follower, "read_logs", stub.read_logs)
    monkeypatch.setattr(log_follower.dirty, "pop", stub.pop)
    return stub


@pytest.fixture
async def follower(redis) -> AsyncIterator[LogFollower]:
    follower = LogFollower(redis, redis, "g1", patience_s=0.2)
    follower.start()
    yield follower
    follower.end_all(Unavailable("leaving", reason="DRAINING"))
    await follower.close()


async def test_one_round_reads_all_who_wait_each_request_once(follower, redis):
    positions = (EntryId(0, 0), EntryId(1, 1), EntryId(1, 2))
    followers = [follower.subscribe(REQUEST, after) for after in positions]
    found = await asyncio.gather(*(one.next() for one in followers))
    assert [[entry.id.number for entry in entries] for entries in found] == [[0, 1, 2, 3], [2, 3], [3]]
    assert redis.rounds == [{REQUEST: EntryId(0, 0)}]


async def test_a_short_absence_is_waited_for(follower, redis):
    redis.away = True
    waiting = asyncio.create_task(follower.subscribe(REQUEST).next())
    await asyncio.sleep(0.06)
    assert not waiting.done()
    redis.away = False
    assert len(await waiting) == 4
    assert len(redis.rounds) >= 2


async def test_a_long_absence_is_said_and_is_over_when_it_is_over(follower, redis):
    redis.away = True
    subscription = follower.subscribe(REQUEST)
    with pytest.raises(Unavailable) as caught:
        await subscription.next()
    assert caught.value.reason == "REDIS_UNAVAILABLE"
    redis.away = False
    assert len(await subscription.next()) == 4


async def test_a_fault_of_our_own_ends_the_wait_and_not_the_reader(follower, redis, monkeypatch):
    async def broken(redis, after):
        raise ZeroDivisionError

    monkeypatch.setattr(log_follower, "read_logs", broken)
    subscription = follower.subscribe(REQUEST)
    with pytest.raises(Exception, match="cannot be read") as caught:
        await subscription.next()
    assert caught.value.code == "INTERNAL"
    monkeypatch.setattr(log_follower, "read_logs", redis.read_logs)
    assert len(await subscription.next()) == 4


async def test_leaving_ends_waits_of_now_and_later(follower, redis):
    redis.away = True
    subscription = follower.subscribe(REQUEST)
    waiting = asyncio.create_task(subscription.next())
    await asyncio.sleep(0.02)
    follower.end_all(Unavailable("leaving", reason="DRAINING"))
    for wait in (waiting, subscription.next()):
        with pytest.raises(Unavailable) as caught:
            await wait
        assert caught.value.reason == "DRAINING"
    with pytest.raises(Unavailable):
        follower.subscribe(REQUEST)
    assert follower.leaving

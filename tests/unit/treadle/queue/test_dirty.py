"""A gateway's list of news: what travels along, what does not, and what cannot be read."""

from __future__ import annotations

from redis.asyncio import Redis

from treadle.api.inference.v1.generation_pb2 import TokenDelta
from treadle.api.worker.v1 import queue_pb2
from treadle.queue import codec, dirty, keys
from treadle.queue.dirty import News
from treadle.queue.keys import RequestKeys
from treadle.queue.log import EntryId, LogEntry

R1 = RequestKeys("default", "r1")
PLACE, BEFORE = EntryId(3, 2), EntryId(3, 1)


def tokens(text: str) -> queue_pb2.StreamEntry:
    return queue_pb2.StreamEntry(tokens=TokenDelta(index=7, token_ids=[1, 2], text=text))


async def pushed(redis: Redis, *items: bytes) -> None:
    pipe = redis.pipeline(transaction=False)
    dirty.push(pipe, {"g1": items})
    await pipe.execute()


async def test_a_small_entry_travels_along_and_a_large_one_stays_in_the_log(redis: Redis, blocking: Redis):
    small, large = tokens("hello"), tokens("x" * dirty.INLINE_BYTES)
    items = [dirty.written(R1, PLACE, codec.encode(entry), BEFORE) for entry in (small, large)]
    await pushed(redis, *items, dirty.unread(R1))
    heard = await dirty.pop(blocking, "g1", block_s=1)
    assert heard == [News(R1, LogEntry(PLACE, small), BEFORE), News(R1), News(R1)]
    print(
        f"{len(items[0])} bytes for an entry of {len(codec.encode(small))}, {len(items[1])} for a large one"
    )


async def test_news_come_in_their_order_and_the_list_is_bounded(redis: Redis, blocking: Redis, monkeypatch):
    monkeypatch.setattr("treadle.queue.keys.DIRTY_LIMIT", 3)
    requests = [RequestKeys("t", f"{number}") for number in range(9)]
    await pushed(redis, *map(dirty.unread, requests))
    assert await dirty.pop(blocking, "g1", block_s=1) == list(map(News, requests[-3:]))
    assert await dirty.pop(blocking, "g1", block_s=0.05) == []
    await pushed(redis, dirty.unread(R1))
    assert 0 < await redis.pttl(keys.dirty("g1")) <= keys.DIRTY_MS


async def test_what_a_later_worker_says_is_left_to_the_log(redis: Redis, blocking: Redis):
    later = tokens("hello")
    later.version = keys.SCHEMA_VERSION + 1
    news = queue_pb2.News(tenant="default", request_id="r1", entry=later.SerializeToString(), epoch=1)
    unknown = queue_pb2.News(tenant="default", request_id="r2", version=keys.SCHEMA_VERSION + 1)
    await pushed(redis, codec.encode(news), unknown.SerializeToString(), b"\xff\xff", dirty.unread(R1))
    heard = await dirty.pop(blocking, "g1", block_s=1)
    assert heard == [News(R1), News(R1)]
    print(f"{len(heard)} of 4 items were of use")

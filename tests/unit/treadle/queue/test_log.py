from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from treadle.api.worker.v1.queue_pb2 import StreamEntry
from treadle.errors import Unavailable
from treadle.queue import codec
from treadle.queue.connection import connect
from treadle.queue.epochs import take
from treadle.queue.keys import RequestKeys
from treadle.queue.log import START, Append, Appended, EntryId, append, read_log, read_logs
from treadle.queue.submission import submit

A, B = RequestKeys("default", "a"), RequestKeys("default", "b")


def tokens(index: int) -> bytes:
    return codec.encode(StreamEntry(tokens={"index": index, "token_ids": [index]}))


async def test_two_owners_in_turn_write_one_history(redis: Redis, lane_entry):
    await submit(redis, lane_entry("a"), lane_limit=10)
    (first,) = await take(redis, [A], "w1")
    assert await append(redis, [Append(A, EntryId(first.epoch, 1), tokens(0))]) == [Appended.WRITTEN]
    (second,) = await take(redis, [A], "w2")
    assert second.epoch == first.epoch + 1
    assert [entry.WhichOneof("entry") for _, entry in second.entries] == [
        "queued",
        "fence",
        "tokens",
        "fence",
    ]
    assert second.watchers == {"g1"}
    assert await append(redis, [Append(A, EntryId(first.epoch, 2), tokens(1))]) == [Appended.FENCED]
    assert await append(redis, [Append(A, EntryId(second.epoch, 1), tokens(1))]) == [Appended.WRITTEN]
    log = await read_log(redis, A)
    assert [entry.tokens.index for _, entry in log.entries if entry.HasField("tokens")] == [0, 1]
    assert log.entries[-1].id == EntryId(second.epoch, 1)
    assert await redis.get(A.owner) == b"w2"


async def test_the_retry_of_an_own_write_counts_as_written(redis: Redis, lane_entry):
    await submit(redis, lane_entry("a"), lane_limit=10)
    (taken,) = await take(redis, [A], "w1")
    entry = Append(A, EntryId(taken.epoch, 1), tokens(0))
    assert await append(redis, [entry]) == [Appended.WRITTEN]
    assert await append(redis, [entry]) == [Appended.WRITTEN]
    log = await read_log(redis, A, EntryId(taken.epoch, 0))
    assert len(log.entries) == 1


async def test_a_vanished_log_stays_gone_and_the_others_are_written(redis: Redis, lane_entry):
    await submit(redis, lane_entry("a"), lane_limit=10)
    await submit(redis, lane_entry("b"), lane_limit=10)
    taken = await take(redis, [A, B], "w1")
    await redis.delete(A.log)
    appends = [Append(item.keys, EntryId(item.epoch, 1), tokens(0)) for item in taken]
    assert await append(redis, appends) == [Appended.VANISHED, Appended.WRITTEN]
    assert not (await read_log(redis, A)).exists
    assert await take(redis, [A, B], "w2") != [None, None]
    assert (await take(redis, [A], "w2")) == [None]


async def test_a_counter_that_redis_lost_is_lifted_over_the_log(redis: Redis, lane_entry):
    await submit(redis, lane_entry("a"), lane_limit=10)
    for _ in range(5):
        (taken,) = await take(redis, [A], "w1")
    await redis.delete(A.epoch)
    (after,) = await take(redis, [A], "w2")
    assert after.epoch > taken.epoch
    assert await append(redis, [Append(A, EntryId(taken.epoch, 1), tokens(0))]) == [Appended.FENCED]


async def test_many_logs_are_read_in_one_go_from_where_each_stands(redis: Redis, lane_entry):
    for name in ("a", "b"):
        await submit(redis, lane_entry(name), lane_limit=10)
    gone = RequestKeys("default", "gone")
    found = await read_logs(redis, {A: START, B: EntryId(0, 1), gone: START})
    assert [len(found[keys].entries) for keys in (A, B, gone)] == [1, 0, 0]
    assert [found[keys].exists for keys in (A, B, gone)] == [True, True, False]


async def test_a_full_redis_refuses_for_now(redis: Redis, lane_entry):
    await submit(redis, lane_entry("a"), lane_limit=10)
    (taken,) = await take(redis, [A], "w1")
    entry = Append(A, EntryId(taken.epoch, 1), tokens(0))
    await redis.config_set("maxmemory", "1")
    try:
        assert await append(redis, [entry]) == [Appended.REFUSED]
    finally:
        await redis.config_set("maxmemory", "0")
    assert await append(redis, [entry]) == [Appended.WRITTEN]


async def test_redis_away_is_unavailable_with_a_time_to_wait():
    client = connect("redis://127.0.0.1:1/0")
    with pytest.raises(Unavailable) as caught:
        await read_log(client, A)
    assert caught.value.reason == "REDIS_UNAVAILABLE"
    assert caught.value.retry_after_s
    await client.aclose()


async def test_a_connection_that_was_cut_while_idle_is_replaced_silently(redis: Redis, redis_url: str):
    client = connect(redis_url)
    await read_log(client, A)
    cut = await redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await asyncio.sleep(0.05)
    assert not (await read_log(client, A)).exists
    await client.aclose()
    assert cut >= 1


async def test_a_redis_that_does_not_answer_is_unavailable(redis: Redis, redis_url: str):
    client = connect(redis_url)
    client.timeout_s = 0.2
    await read_log(client, A)
    await redis.execute_command("CLIENT", "PAUSE", "1000", "ALL")
    with pytest.raises(Unavailable):
        await read_log(client, A)
    client.timeout_s = 5.0
    assert not (await read_log(client, A)).exists
    await client.aclose()


async def test_a_cancelled_call_ends(redis: Redis):
    """Cancelled at every turn of the event loop, a command never swallows it."""
    cancelled = 0
    for turns in range(30):
        task = asyncio.create_task(read_log(redis, A))
        for _ in range(turns):
            await asyncio.sleep(0)
        running = task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.cancelled() == running, turns
        cancelled += running
    assert cancelled > 3
    assert not (await read_log(redis, A)).exists

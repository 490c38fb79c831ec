"""One connection for many: order, errors, losses, and reads that block."""

from __future__ import annotations

import asyncio
import random

import pytest
from redis import exceptions
from redis.asyncio import Redis

from treadle.queue.connection import connect, connect_blocking
from treadle.queue.line import packed


async def num_connections(redis: Redis) -> int:
    clients = await redis.execute_command("CLIENT", "LIST")
    return len(clients.splitlines())


async def test_many_callers_share_a_line_and_each_gets_its_own_replies(redis: Redis, redis_url: str):
    before = await num_connections(redis)
    client = connect(redis_url)
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)

    async def ask(number: int) -> int:
        await asyncio.sleep(rng.random() / 20)
        pipe = client.pipeline(transaction=False)
        count = rng.randrange(1, 6)
        for part in range(count):
            pipe.echo(f"{number}.{part}")
        replies = pipe.execute()
        if number % 5 == 0:
            task = asyncio.create_task(replies)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return 0
        assert await replies == [f"{number}.{part}".encode() for part in range(count)], seed
        return count

    counts = await asyncio.gather(*(ask(number) for number in range(500)))
    assert await num_connections(redis) == before + 1
    await client.aclose()
    print(f"{sum(counts)} replies to 400 callers, 100 others left meanwhile, seed {seed}")


async def test_an_error_is_one_callers_alone_and_pipelines_may_keep_theirs(redis: Redis):
    await redis.set("text", "words")
    found = await asyncio.gather(
        redis.incr("text"), redis.get("text"), redis.execute_command("NOSUCH"), return_exceptions=True
    )
    assert isinstance(found[0], exceptions.ResponseError)
    assert found[1] == b"words"
    assert isinstance(found[2], exceptions.ResponseError)
    pipe = redis.pipeline(transaction=False).get("text").incr("text").get("text")
    first, wrong, last = await pipe.execute(raise_on_error=False)
    assert (first, last) == (b"words", b"words")
    assert isinstance(wrong, exceptions.ResponseError)
    with pytest.raises(exceptions.ResponseError):
        await redis.pipeline(transaction=False).incr("text").execute()
    with pytest.raises(exceptions.DataError):
        await redis.set("text", {"of": "no type"})
    assert await redis.pipeline(transaction=False).execute() == []


async def test_a_lost_line_fails_all_its_calls_and_the_next_call_opens_another(redis: Redis, redis_url: str):
    client = connect(redis_url)
    await client.set("a", 1)
    await redis.execute_command("CLIENT", "PAUSE", "300", "WRITE")
    waiting = [asyncio.create_task(client.incr("a")) for _ in range(20)]
    await asyncio.sleep(0.05)
    await redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    found = await asyncio.gather(*waiting, return_exceptions=True)
    lost = [error for error in found if isinstance(error, exceptions.ConnectionError)]
    assert len(lost) == len(set(map(id, lost))) == 20
    assert await asyncio.gather(*(client.ping() for _ in range(20))) == [True] * 20
    await client.aclose()
    print(f"{len(lost)} of 20 calls failed with their line, 20 of 20 went on")


async def test_reads_that_block_wait_for_nobody_and_one_that_is_left_takes_nothing(
    redis: Redis, redis_url: str
):
    client = connect_blocking(redis_url, block_s=5)
    before = await num_connections(redis)
    reads = [asyncio.create_task(client.blpop([f"list{number}"], timeout=5)) for number in range(3)]
    await asyncio.sleep(0.05)
    assert await num_connections(redis) == before + 3
    reads[1].cancel()
    await asyncio.gather(reads[1], return_exceptions=True)
    await asyncio.sleep(0.05)
    for number in range(3):
        await redis.rpush(f"list{number}", "x")
    assert (await reads[0])[1] == (await reads[2])[1] == b"x"
    assert await redis.llen("list1") == 1
    await client.blpop(["list1"], timeout=1)
    assert await num_connections(redis) == before + 2, "an idle line is used again"
    await client.aclose()


def test_names_of_several_words_and_numbers_are_packed():
    assert packed(("XGROUP CREATE", b"k", "g", 0)) == (
        b"*5\r\n$6\r\nXGROUP\r\n$6\r\nCREATE\r\n$1\r\nk\r\n$1\r\ng\r\n$1\r\n0\r\n"
    )

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.errors import AlreadyExists, ResourceExhausted
from treadle.queue import codec, keys, lanes
from treadle.queue.keys import RequestKeys
from treadle.queue.log import read_log
from treadle.queue.submission import renew_attached, submit

LANE = keys.lane("p-1", "normal", "default")
R1 = RequestKeys("default", "r1")


async def test_a_submitted_request_is_in_its_lane_with_its_log(redis: Redis, lane_entry):
    assert await submit(redis, lane_entry(), lane_limit=10)
    assert await lanes.find(redis, "p-1") == [LANE]
    (delivery,) = await lanes.take_new(redis, LANE, "w1", 5)
    assert codec.decode(LaneEntry, delivery.data).request_id == "r1"
    (entry,) = (await read_log(redis, R1)).entries
    assert entry.entry.queued.gateway_id == "g1"
    assert await redis.exists(R1.attached) == 1
    assert await redis.exists(R1.enqueuing) == 0
    for key in (R1.log, R1.watchers, R1.reservation):
        assert await redis.pttl(key) > 0


async def test_a_hundred_calls_with_one_id_make_one_entry(redis: Redis, lane_entry):
    made = await asyncio.gather(*(submit(redis, lane_entry(), lane_limit=1000) for _ in range(100)))
    assert sum(made) == 1
    assert await redis.xlen(LANE) == 1
    print("one entry for", len(made), "calls")


async def test_another_payload_under_the_same_id_already_exists(redis: Redis, lane_entry):
    await submit(redis, lane_entry(), lane_limit=10)
    with pytest.raises(AlreadyExists) as caught:
        await submit(redis, lane_entry(payload_digest="d2"), lane_limit=10)
    assert caught.value.reason == "REQUEST_ID_TAKEN"
    assert not await submit(redis, lane_entry(), lane_limit=10)


async def test_a_full_lane_refuses_and_forgets(redis: Redis, lane_entry):
    for number in range(3):
        await submit(redis, lane_entry(f"r{number}"), lane_limit=3)
    with pytest.raises(ResourceExhausted) as caught:
        await submit(redis, lane_entry("late"), lane_limit=3)
    assert caught.value.reason == "LANE_FULL"
    assert caught.value.retry_after_s
    assert await submit(redis, lane_entry("late"), lane_limit=4)


class Died(Exception):
    """The gateway ended here."""


class DyingRedis:
    """Carries out a pipeline's first commands, then fails as a gateway that dies: its calls never return."""

    def __init__(self, redis: Redis, survive: int) -> None:
        self._redis = redis
        self._left = survive

    def __getattr__(self, name: str):
        return getattr(self._redis, name)

    def pipeline(self, transaction: bool):
        pipe = self._redis.pipeline(transaction=transaction)
        execute = pipe.execute

        async def dying(raise_on_error: bool = True):
            if self._left >= len(pipe.command_stack):
                self._left -= len(pipe.command_stack)
                return await execute(raise_on_error)
            del pipe.command_stack[self._left :]
            await execute(False)
            raise Died

        pipe.execute = dying
        return pipe


async def test_a_retry_puts_right_what_a_dead_gateway_left(redis: Redis, lane_entry, monkeypatch):
    monkeypatch.setattr(keys, "ENQUEUING_MS", 100)
    died = 0
    for survive in range(100):
        name = f"r{survive}"
        try:
            await submit(DyingRedis(redis, survive), lane_entry(name), lane_limit=1000)
        except Died:
            died += 1
        else:
            break
        await submit(redis, lane_entry(name), lane_limit=1000)
        request = RequestKeys("default", name)
        assert await redis.hget(request.reservation, "entry") is not None
        assert (await read_log(redis, request)).entries[0].entry.HasField("queued")
    delivered = await lanes.take_new(redis, LANE, "w1", 1000)
    names = {codec.decode(LaneEntry, delivery.data).request_id for delivery in delivered}
    assert names == {f"r{number}" for number in range(died + 1)}
    assert died > 10
    print("deaths between two writes:", died)


async def test_attached_is_renewed(redis: Redis, lane_entry):
    await submit(redis, lane_entry(), lane_limit=10)
    await redis.pexpire(R1.attached, 50)
    await renew_attached(redis, "g1", [R1])
    assert await redis.pttl(R1.attached) > 1000

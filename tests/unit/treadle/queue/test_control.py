from __future__ import annotations

import pytest
from google.rpc.status_pb2 import Status
from redis.asyncio import Redis

from treadle.api.worker.v1.queue_pb2 import StreamEntry
from treadle.errors import NotFound
from treadle.queue import codec, control, dirty, keys, lanes
from treadle.queue.epochs import take
from treadle.queue.keys import RequestKeys
from treadle.queue.log import Append, Appended, EntryId, append, read_log
from treadle.queue.submission import submit

R1 = RequestKeys("default", "r1")
CANCELLED = Status(code=1, message="cancelled")


async def test_cancel_ends_a_waiting_request_once(redis: Redis, blocking: Redis, lane_entry):
    await submit(redis, lane_entry(), lane_limit=10)
    assert await control.cancel(redis, R1, CANCELLED)
    assert not await control.cancel(redis, R1, CANCELLED)
    log = await read_log(redis, R1)
    assert [entry.WhichOneof("entry") for _, entry in log.entries] == ["queued", "fence", "terminal"]
    assert log.entries[-1].entry.terminal.error == CANCELLED
    assert await dirty.pop(blocking, "g1", block_s=1) == [dirty.News(R1)]
    (late,) = await take(redis, [R1], "w1")
    assert late.terminal is not None


async def test_cancel_takes_the_entry_out_of_its_lane_once_a_worker_has_it(redis: Redis, lane_entry):
    lane = keys.lane("p-1", "normal", "default")
    await submit(redis, lane_entry("waits"), lane_limit=10)
    assert await control.cancel(redis, RequestKeys("default", "waits"), CANCELLED)
    assert await redis.xlen(lane) == 1
    (late,) = await lanes.take_new(redis, lane, "w1", 1)
    await lanes.remove(redis, [late])
    await submit(redis, lane_entry(), lane_limit=10)
    await lanes.take_new(redis, lane, "w1", 1)
    assert await control.cancel(redis, R1, CANCELLED)
    assert await redis.xlen(lane) == 0
    assert (await redis.xpending(lane, keys.GROUP))["pending"] == 0


async def test_cancel_stops_the_owner_and_tells_it(redis: Redis, blocking: Redis, lane_entry):
    await submit(redis, lane_entry(), lane_limit=10)
    (taken,) = await take(redis, [R1], "w1")
    assert await control.cancel(redis, R1, CANCELLED)
    data = codec.encode(StreamEntry(tokens={"token_ids": [1]}))
    assert await append(redis, [Append(R1, EntryId(taken.epoch, 1), data)]) == [Appended.CANCELLED]
    last, (notice,) = await control.read_notices(blocking, "w1", "0", block_ms=1000)
    assert (notice.entry.cancel.tenant, notice.entry.cancel.request_id) == ("default", "r1")
    assert await control.read_notices(blocking, "w1", last, block_ms=10) == (last, [])


async def test_cancel_of_an_unknown_request_is_not_found(redis: Redis):
    with pytest.raises(NotFound):
        await control.cancel(redis, R1, CANCELLED)
    assert not await redis.exists(R1.log)


async def test_a_second_gateway_watches(redis: Redis, blocking: Redis, lane_entry):
    await submit(redis, lane_entry(), lane_limit=10)
    await take(redis, [R1], "w1")
    await control.watch(redis, R1, "g2")
    _, (notice,) = await control.read_notices(blocking, "w1", "0", block_ms=1000)
    assert notice.entry.watch.gateway_id == "g2"
    (taken,) = await take(redis, [R1], "w2")
    assert taken.watchers == {"g1", "g2"}

"""More than there is room for is refused, and told when to come again; who does not read slows nobody."""

from __future__ import annotations

import asyncio
import time

import pytest
from client_record import Record, attach, own_channel, start, undisturbed
from live_streams import begin, check_whole, renamed
from waiting import until

from treadle.api.inference.v1 import generation_pb2, inference_pb2_grpc
from treadle.api.worker.v1.queue_pb2 import LaneEntry, StreamEntry, Terminal
from treadle.queue import codec, keys
from treadle.queue.epochs import take
from treadle.queue.keys import RequestKeys
from treadle.queue.log import Append, Appended, EntryId, append
from treadle.queue.submission import submit

FLOOD = 500
CONCURRENT_WRITES = 32
"""Of one gateway: so many may have seen room that one of them takes."""
READERS = 16


async def test_a_flood_is_refused_above_the_lanes_limit_and_what_is_taken_is_answered(
    stack, gateways, queue, ask
):
    limit = int(stack.environment["TREADLE_GATEWAY_LANE_LIMIT"])
    asked = ask([9, 8, 7], 900, tenant="flood")
    expected = await undisturbed(gateways[0], asked)
    longest, refused_after_s = 0, []

    async def one(number: int) -> Record:
        began = time.monotonic()
        record = await Record().listen(start(gateways[number % 2], renamed(asked, f"flood{number}")))
        if record.error is not None:
            refused_after_s.append(time.monotonic() - began)
        return record

    tasks = [asyncio.create_task(one(number)) for number in range(FLOOD)]
    while not all(task.done() for task in tasks):
        longest = max(longest, await queue.num_entries())
        await asyncio.sleep(0.005)
    records = [task.result() for task in tasks]
    answers = [record.told() for record in records if record.error is None]
    refusals = [record.error for record in records if record.error is not None]
    assert answers == [expected] * len(answers)
    for error in refusals:
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "LANE_FULL")
        assert error.retry_after_s
        assert error.retry_after_s > 0
    assert len(answers) >= limit
    assert len(refusals) > 0
    assert longest <= limit + 2 * CONCURRENT_WRITES
    await queue.until_empty()
    # There is room again.
    assert await undisturbed(gateways[1], asked) == expected
    print(
        f"{FLOOD} at once into a lane of {limit}: {len(answers)} answered, {len(refusals)} refused, "
        f"the slowest after {max(refused_after_s):.2f} s; at most {longest} entries"
    )


@pytest.fixture
async def own_channels(stack):
    """Connections to the first gateway that nobody shares: who does not read fills only its own."""
    channels = [own_channel(stack["gateway-1"].address) for _ in range(READERS)]
    yield channels
    for channel in channels:
        await channel.close()


async def test_readers_that_read_nothing_slow_nobody_and_find_everything_later(
    gateways, queue, ask, own_channels
):
    large = ask(
        "Heart", 800, output={"logprobs": 20}, disconnect={"mode": generation_pb2.DISCONNECT_MODE_DETACH}
    )
    small = ask("Love", 200, "small", sampling={"repetition_penalty": 1.2})
    expected_large, expected_small = await asyncio.gather(
        *(undisturbed(gateways[1], one) for one in (large, small))
    )
    quick = begin([gateways[0]], [renamed(small, f"alone{number}") for number in range(4)])
    await check_whole(quick, [expected_small] * 4, gateways)
    calls = []
    for number, channel in enumerate(own_channels):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls.append(start(stub, renamed(large, f"unread{number}")))

    async def all_run() -> bool:
        return await queue.num_entries() == READERS

    await until(all_run, "all of them run")
    beside = begin([gateways[0]], [renamed(small, f"beside{number}") for number in range(4)])
    await check_whole(beside, [expected_small] * 4, gateways)
    # Their answers are written whether they read or not.
    await queue.until_empty(60)
    told = [(await Record().listen(call)).told() for call in calls]
    assert told == [expected_large] * READERS
    gaps = [max(record.longest_gap_s for record in live.records) for live in (quick, beside)]
    print(
        f"{READERS} read nothing until their answers were complete, then all {READERS} whole; 4 beside them "
        f"whole, longest gap {gaps[1]:.2f} s (without them {gaps[0]:.2f} s)"
    )


ENTRIES, ENTRY_BYTES = 8_000, 1_000
BOUND = READERS * (1024 * ENTRY_BYTES * 3 + (1 << 20))
"""A reader holds what one read of its log gives, 1,024 entries, as bytes and as messages, and what fits into
its connection."""


async def write_log(redis, request_id: str) -> RequestKeys:
    """An answer of many megabytes, as a worker would have written it."""
    entry = LaneEntry(
        request_id=request_id, tenant="default", profile="nobody", gateway_id="g", payload_digest="d"
    )
    await submit(redis, entry, lane_limit=10)
    request = RequestKeys("default", request_id)
    (taken,) = await take(redis, [request], "writer-1")
    text = "x" * ENTRY_BYTES
    pipe = redis.pipeline(transaction=False)
    for number in range(ENTRIES):
        tokens = generation_pb2.TokenDelta(index=number, token_ids=[7], text=text)
        data = codec.encode(StreamEntry(tokens=tokens))
        pipe.xadd(request.log, {codec.FIELD: data}, id=str(EntryId(taken.epoch, number + 1)))
    await pipe.execute()
    finished = generation_pb2.Finished(
        choices=[{"finish_reason": generation_pb2.FINISH_REASON_LENGTH}],
        usage={"prompt_tokens": 1, "output_tokens": ENTRIES},
    )
    end = codec.encode(StreamEntry(terminal=Terminal(finished=finished)))
    outcome = await append(redis, [Append(request, EntryId(taken.epoch, ENTRIES + 1), end)])
    assert outcome == [Appended.WRITTEN]
    (lane,) = await redis.smembers(keys.lanes("nobody"))
    await redis.delete(lane)
    return request


async def test_what_a_gateway_holds_for_readers_that_read_nothing_is_bounded(
    stack, redis, gateways, own_channels
):
    request = await write_log(redis, "large")
    asked = generation_pb2.Generation(request_id=request.request_id)
    gateway = stack["gateway-1"]
    # What reading one of them to its end leaves behind is there before.
    read = await Record().listen(attach(gateways[0], asked))
    assert read.num_tokens == ENTRIES
    before = gateway.resident_bytes
    calls = [attach(inference_pb2_grpc.InferenceServiceStub(channel), asked) for channel in own_channels]
    await asyncio.sleep(3)
    held = gateway.resident_bytes - before
    whole = READERS * ENTRIES * ENTRY_BYTES
    print(f"{READERS} readers of {whole >> 20} MiB together hold {held >> 20} MiB; bound: {BOUND >> 20} MiB")
    assert whole > BOUND
    assert held < BOUND
    for call in calls[:2]:
        assert (await Record().listen(call)).num_tokens == ENTRIES
    for call in calls[2:]:
        call.cancel()
    await redis.delete(*request.living_with_log)

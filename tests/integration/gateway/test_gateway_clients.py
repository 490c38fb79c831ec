"""Clients that go away, come twice, come too many at once, or do not read."""

from __future__ import annotations

import asyncio
import gc
import logging

import grpc
import pytest
from google.protobuf import duration_pb2

from treadle.api.inference.v1 import generation_pb2, inference_pb2
from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.queue import codec, keys
from treadle.queue.keys import RequestKeys
from treadle.queue.log import log_entries
from treadle.rpc import from_rpc_error

DETACH = {"mode": generation_pb2.DISCONNECT_MODE_DETACH}


async def failure(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def end_of(redis, request_id: str):
    """The request's terminal entry, once it is there."""
    async with asyncio.timeout(10):
        while True:
            last = await redis.xrevrange(RequestKeys("default", request_id).log, count=2)
            for _, entry in log_entries(last):
                if entry.HasField("terminal"):
                    return entry.terminal
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("unary", [False, True])
async def test_a_client_that_goes_away_cancels(
    stub, gateway, worker, redis, generation, stream, read, eventually, unary
):
    permits = worker.hold("r1", 2)
    if unary:
        call = stub.Generate(inference_pb2.GenerateRequest(generation=generation("r1", 500)), timeout=60)
        await eventually(lambda: len(worker.taken) == 1, "it runs")
    else:
        call = stream(stub, generation("r1", 500))
        await read(call, 3)
    call.cancel()
    end = await end_of(redis, "r1")
    assert end.error.code == grpc.StatusCode.CANCELLED.value[0]
    permits.release()
    permits.release()
    await eventually(lambda: worker.fenced + worker.found_ended == ["r1"], "the worker drops it")
    await eventually(lambda: gateway.admission.held == 0 and len(gateway.follower) == 0, "nothing is held")


async def test_a_client_that_detaches_comes_back_through_another_gateway(
    start_gateway, connect_to, worker, redis, generation, stream, read, eventually
):
    first, second = await start_gateway(), await start_gateway()
    permits = worker.hold("r1", 2)
    call = stream(await connect_to(first), generation("r1", 20, disconnect=DETACH))
    head = await read(call, 3)
    call.cancel()
    await eventually(lambda: first.admission.held == 0 and len(first.background) == 0, "the client is gone")
    for _ in range(18):
        permits.release()
    assert (await end_of(redis, "r1")).HasField("finished")
    stub = await connect_to(second)
    whole = await read(stub.Attach(inference_pb2.AttachRequest(request_id="r1"), timeout=10))
    rest = inference_pb2.AttachRequest(request_id="r1", cursor=head[-1].cursor)
    assert whole == head + await read(stub.Attach(rest, timeout=10))
    assert len(whole) == 22


async def test_many_clients_that_leave_at_any_moment_leave_nothing(
    stub, gateway, worker, redis, generation, stream, read, eventually
):
    """Left before, during and after submission: no orphan, no slot held, every end is written."""

    async def leave(number: int) -> None:
        worker.hold(f"r{number}", 1)
        call = stream(stub, generation(f"r{number}", 400))
        await asyncio.sleep(0.008 * number)
        call.cancel()

    await asyncio.gather(*(leave(number) for number in range(40)))
    await eventually(lambda: gateway.admission.held == 0 and len(gateway.background) == 0, "all are gone")
    submitted = await redis.keys("treadle:request:*:log")
    for key in submitted:
        request_id = key.decode().split("default:")[1].split("}")[0]
        assert (await end_of(redis, request_id)).error.code == grpc.StatusCode.CANCELLED.value[0]
    print(f"{len(submitted)} of 40 had been submitted, all are cancelled")
    assert submitted


async def test_one_id_at_once_is_one_lane_entry(
    start_gateway, connect_to, worker, redis, generation, stream, read
):
    stubs = [await connect_to(await start_gateway()) for _ in range(2)]
    calls = [stream(stubs[number % 2], generation("r1", 30)) for number in range(20)]
    streams = await asyncio.gather(*(read(call) for call in calls))
    assert all(chunks == streams[0] for chunks in streams)
    assert len(streams[0]) == 32
    assert [entry.request_id for entry in worker.taken] == ["r1"]
    error = await failure(read(stream(stubs[0], generation("r1", 31))))
    assert (error.code, error.reason) == ("ALREADY_EXISTS", "REQUEST_ID_TAKEN")
    # Its refusal must not touch the request that has the id, nor does the time that is left make another.
    again = generation("r1", 30, timeout=duration_pb2.Duration(seconds=7), tenant="default")
    assert await read(stream(stubs[1], again)) == streams[0]
    assert len(worker.taken) == 1


async def test_ids_belong_to_tenants(stub, worker, generation, stream, read):
    for tenant in ("", "a", "b"):
        chunks = await read(stream(stub, generation("r1", 3 + len(tenant), tenant=tenant)))
        assert chunks[-1].finished.usage.output_tokens == 3 + len(tenant)
    assert [entry.tenant for entry in worker.taken] == ["default", "a", "b"]


async def test_the_last_of_several_clients_cancels(
    stub, gateway, worker, redis, generation, stream, read, eventually
):
    permits = worker.hold("r1", 3)
    calls = [stream(stub, generation("r1", 50)) for _ in range(3)]
    await asyncio.gather(*(read(call, 3) for call in calls))
    for call in calls[:2]:
        call.cancel()
    await eventually(lambda: len(gateway.follower) == 1 and len(gateway.background) == 0, "two are gone")
    permits.release()
    assert len(await read(calls[2], 2)) == 2
    calls[2].cancel()
    assert (await end_of(redis, "r1")).error.code == grpc.StatusCode.CANCELLED.value[0]


async def test_a_client_at_another_gateway_keeps_the_request(
    start_gateway, connect_to, worker, generation, stream, read, eventually
):
    first, second = await start_gateway(), await start_gateway()
    permits = worker.hold("r1", 3)
    calls = [stream(await connect_to(one), generation("r1", 12)) for one in (first, second)]
    for call in calls:
        await read(call, 3)
    calls[0].cancel()
    await eventually(lambda: first.admission.held == 0 and len(first.background) == 0, "the first is gone")
    for _ in range(10):
        permits.release()
    assert len(await read(calls[1])) == 11


@pytest.mark.parametrize("by_field", [True, False])
async def test_a_deadline_ends_the_call_and_the_request(
    stub, gateway, worker, redis, generation, stream, read, by_field
):
    worker.hold("r1", 2)
    field = {"timeout": duration_pb2.Duration(nanos=400_000_000)} if by_field else {}
    call = stream(stub, generation("r1", 500, **field), timeout=20 if by_field else 0.4)
    error = await failure(read(call))
    assert error.code == "DEADLINE_EXCEEDED"
    end = await end_of(redis, "r1")
    assert end.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0] or not by_field
    assert end.HasField("error")
    assert 0 < worker.taken[0].timeout_ms <= 400


async def test_clients_that_are_there_are_renewed(
    stub, gateway, worker, redis, generation, stream, read, eventually
):
    worker.hold("r1", 1)
    call = stream(stub, generation("r1"))
    await read(call, 2)
    request = RequestKeys("default", "r1")
    assert await redis.get(request.attached) == gateway.gateway_id.encode()
    await redis.pexpire(request.attached, 60_000)

    async def renewed() -> bool:
        return 0 < await redis.pttl(request.attached) <= keys.ATTACHED_MS

    await eventually(renewed, "the key lives as long as it should again")
    call.cancel()


async def test_a_reader_that_does_not_read_holds_little_and_slows_nobody(
    stub, start_gateway, connect_to, gateway, worker, redis, generation, stream, read
):
    """Of an answer of 12 MB the gateway takes what its connection's window takes."""
    worker.padding = "x" * 8_000
    count = 1_500
    call = stream(await connect_to(gateway), generation("slow", count), timeout=60)
    await read(call, 1)
    assert (await end_of(redis, "slow")).HasField("finished")
    held = gateway.follower.entries_read
    worker.padding = ""
    others = [await read(stream(stub, generation(f"quick{number}", 20))) for number in range(5)]
    assert [len(chunks) for chunks in others] == [22] * 5
    assert held < count, "the log was read for a client that does not read"
    rest = await read(call)
    assert [chunk.tokens.index for chunk in rest[:-1]] == list(range(count))
    print(f"{held} of {count} entries were read ahead of a client that read one")


async def test_a_client_that_leaves_without_reading_leaves_nothing(
    stub, gateway, worker, redis, generation, stream, read, eventually, caplog
):
    """The handler waits in a write then, not for an entry."""
    caplog.set_level(logging.INFO)
    worker.padding = "x" * 100_000
    permits = worker.hold("r1", 100)
    call = stream(stub, generation("r1", 300))
    await read(call, 1)

    async def is_written() -> bool:
        return await redis.xlen(RequestKeys("default", "r1").log) >= 103

    await eventually(is_written, "more is written than a window holds")
    call.cancel()
    assert (await end_of(redis, "r1")).error.code == grpc.StatusCode.CANCELLED.value[0]
    permits.release()
    await eventually(lambda: gateway.admission.held == 0 and len(gateway.follower) == 0, "nothing is held")
    gc.collect()
    await asyncio.sleep(0.1)
    ours = [record for record in caplog.records if record.name.startswith("treadle")]
    assert ours
    assert [record for record in ours if record.levelno >= logging.ERROR] == []


async def test_a_full_lane_refuses_the_excess(
    start_gateway, connect_to, redis, generation, stream, read, worker, eventually
):
    for number in range(2):
        worker.hold(f"r{number}")
    stub = await connect_to(await start_gateway(lane_limit=2))
    held = [stream(stub, generation(f"r{number}")) for number in range(2)]
    for call in held:
        await read(call, 1)
    error = await failure(read(stream(stub, generation("r2"))))
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "LANE_FULL")
    assert error.retry_after_s
    chunks = await read(stream(stub, generation("r3", priority=generation_pb2.PRIORITY_HIGH)))
    assert len(chunks) == 7
    worker.hold("r0", 0)
    for _ in range(5):
        worker.hold("r0").release()
    await read(held[0])

    async def one_is_left() -> bool:
        return await redis.xlen(keys.lane("p-tiny", "normal", "default")) == 1

    await eventually(one_is_left, "the worker deletes what it finished")
    assert len(await read(stream(stub, generation("r2")))) == 7
    held[1].cancel()


async def test_a_full_gateway_refuses_the_excess(start_gateway, connect_to, worker, generation, stream, read):
    gateway = await start_gateway(max_concurrent_requests=2)
    stub = await connect_to(gateway)
    for number in range(2):
        worker.hold(f"r{number}")
    held = [stream(stub, generation(f"r{number}")) for number in range(2)]
    for call in held:
        await read(call, 1)
    for refused in (
        read(stream(stub, generation("r2"))),
        read(stub.Attach(inference_pb2.AttachRequest(request_id="r0"), timeout=5)),
    ):
        error = await failure(refused)
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "GATEWAY_FULL")
        assert error.retry_after_s
    for _ in range(5):
        worker.hold("r0").release()
    await read(held[0])
    assert len(await read(stream(stub, generation("r2")))) == 7
    held[1].cancel()


async def test_a_gateway_that_leaves_sends_its_clients_elsewhere(
    start_gateway,
    connect_to,
    redis_url,
    registry_server,
    tokenizer_server,
    worker,
    redis,
    generation,
    stream,
    read,
):
    from treadle_gateway.config import GatewayConfig
    from treadle_gateway.gateway import running_gateway

    config = GatewayConfig(
        address="127.0.0.1:0",
        registry_address=f"127.0.0.1:{registry_server.port}",
        tokenizer_address=f"127.0.0.1:{tokenizer_server.port}",
        redis_url=redis_url,
        grace_period_s=1.0,
    )
    permits = worker.hold("r1", 2)
    other = await connect_to(await start_gateway())
    async with running_gateway(config) as leaving:
        call = stream(await connect_to(leaving), generation("r1", 6))
        head = await read(call, 3)
        reading = asyncio.create_task(failure(read(call)))
    error = await reading
    assert (error.code, error.reason) == ("UNAVAILABLE", "DRAINING")
    for _ in range(4):
        permits.release()
    request = inference_pb2.AttachRequest(request_id="r1", cursor=head[-1].cursor)
    rest = await read(other.Attach(request, timeout=10))
    assert [chunk.tokens.index for chunk in rest[:-1]] == [2, 3, 4, 5]


async def test_waiting_requests_stay_in_the_lane(stub, redis, worker, generation, stream, read, eventually):
    """Cancelling deletes no lane entry: who claims it finds the end."""
    worker.stopping = True
    await asyncio.sleep(0.3)
    call = stream(stub, generation("r1"))
    lane = keys.lane("p-tiny", "normal", "default")

    async def waits() -> bool:
        return await redis.xlen(lane) == 1

    await eventually(waits, "it waits in its lane")
    assert (await stub.Cancel(inference_pb2.CancelRequest(request_id="r1"), timeout=5)).cancelled
    assert (await failure(read(call))).code == "CANCELLED"
    ((_, values),) = await redis.xrange(lane)
    assert codec.from_fields(LaneEntry, values).request_id == "r1"

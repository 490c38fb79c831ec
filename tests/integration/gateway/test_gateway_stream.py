"""A request's chunks through the gateway: in order, whole, attached to, cancelled."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import duration_pb2

from treadle.api.inference.v1 import generation_pb2, inference_pb2
from treadle.api.worker.v1.queue_pb2 import Fence, StreamEntry
from treadle.queue.keys import RequestKeys
from treadle.queue.log import Appended, EntryId
from treadle.rpc import from_rpc_error


async def failure(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def kinds(chunks) -> list[str]:
    return [chunk.WhichOneof("chunk") for chunk in chunks]


def attach(stub, request_id: str, cursor: str = "", **fields):
    request = inference_pb2.AttachRequest(request_id=request_id, cursor=cursor, **fields)
    return stub.Attach(request, timeout=20)


async def test_a_stream_starts_goes_on_and_finishes(stub, worker, generation, stream, read):
    chunks = await read(stream(stub, generation("r1", 40)))
    assert kinds(chunks) == ["started", *["tokens"] * 40, "finished"]
    assert [chunk.tokens.index for chunk in chunks[1:-1]] == list(range(40))
    assert len({chunk.cursor for chunk in chunks}) == 42
    assert chunks[0].started.prompt_tokens == chunks[-1].finished.usage.prompt_tokens == 5
    assert chunks[0].started.seed == worker.taken[0].sampling.seed


async def test_a_lane_entry_is_complete(stub, worker, generation, gateway):
    asked = generation(
        count=0,
        sampling={"top_p": 0.5, "logit_bias": {7: 1.5}},
        timeout=duration_pb2.Duration(seconds=9),
        stopping={"stop_token_ids": [9], "stop_strings": ["x"]},
    )
    asked.stopping.ClearField("max_new_tokens")
    asked.token_ids.ids.extend([1] * 9_990)
    answer = await stub.Generate(inference_pb2.GenerateRequest(generation=asked), timeout=20)
    (entry,) = worker.taken
    sampling = entry.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.75, 5, 0.5, 0.0)
    assert (sampling.repetition_penalty, sampling.n, dict(sampling.logit_bias)) == (1.0, 1, {7: 1.5})
    for field in sampling.DESCRIPTOR.fields:
        assert field.is_repeated or sampling.HasField(field.name), f"{field.name} is left to a default"
    assert answer.started.seed == sampling.seed < 2**53
    assert (entry.stopping.max_new_tokens, entry.stopping.min_new_tokens) == (10, 0)
    assert list(entry.stopping.stop_token_ids) == [9, 2]
    assert list(entry.stopping.stop_strings) == ["x"]
    assert 0 < entry.timeout_ms <= 9000
    assert entry.request_id == answer.started.request_id != ""
    assert (entry.tenant, entry.profile, entry.model_name) == ("default", "p-tiny", "tiny")
    assert entry.priority == generation_pb2.PRIORITY_NORMAL
    assert entry.disconnect_mode == generation_pb2.DISCONNECT_MODE_CANCEL
    assert entry.retention_ms == 60_000
    assert entry.gateway_id == gateway.gateway_id
    assert entry.payload_digest.startswith("sha256:")
    assert not entry.output.HasField("logprobs")


async def test_ignore_eos_and_detach_reach_the_worker(stub, worker, generation):
    asked = generation(
        stopping={"ignore_eos": True},
        disconnect={"mode": generation_pb2.DISCONNECT_MODE_DETACH},
        output={"logprobs": 0},
        priority=generation_pb2.PRIORITY_HIGH,
    )
    await stub.Generate(inference_pb2.GenerateRequest(generation=asked), timeout=20)
    (entry,) = worker.taken
    assert list(entry.stopping.stop_token_ids) == []
    assert entry.disconnect_mode == generation_pb2.DISCONNECT_MODE_DETACH
    assert entry.retention_ms == 300_000
    assert entry.output.HasField("logprobs")
    assert entry.priority == generation_pb2.PRIORITY_HIGH


async def test_unary_is_the_stream_gathered(stub, worker, generation, stream, read):
    chunks = await read(stream(stub, generation("r1", 30)))
    request = inference_pb2.GenerateRequest(generation=generation("r1", 30))
    answer = await stub.Generate(request, timeout=20)
    (choice,) = answer.choices
    assert list(choice.token_ids) == [id_ for chunk in chunks for id_ in chunk.tokens.token_ids]
    assert choice.text == "".join(chunk.tokens.text for chunk in chunks)
    assert choice.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    assert answer.started == chunks[0].started
    assert answer.usage == chunks[-1].finished.usage
    assert len(worker.taken) == 1


async def test_chat_and_ids_become_prompts(stub, worker, generation):
    chat = {"messages": [{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}]}
    for asked in (generation(chat=chat), generation(token_ids={"ids": [5, 6, 7]})):
        await stub.Generate(inference_pb2.GenerateRequest(generation=asked), timeout=20)
    assert [list(entry.prompt_token_ids) for entry in worker.taken] == [[101, 102, 103], [5, 6, 7]]


async def test_another_gateway_gives_the_whole_identical_stream(
    start_gateway, connect_to, worker, generation, stream, read
):
    first, second = [await connect_to(await start_gateway()) for _ in range(2)]
    permits = worker.hold("r1", 10)
    call = stream(first, generation("r1", 20))
    head = await read(call, 8)
    whole, rest = attach(second, "r1"), attach(second, "r1", head[4].cursor)
    again = [await read(whole, 11), await read(rest, 6)]
    for _ in range(10):
        permits.release()
    chunks = head + await read(call)
    assert kinds(chunks) == ["started", *["tokens"] * 20, "finished"]
    assert again[0] + await read(whole) == chunks
    assert again[1] + await read(rest) == chunks[5:]
    assert len(worker.taken) == 1


async def test_attach_goes_on_after_every_cursor(stub, worker, generation, stream, read):
    chunks = await read(stream(stub, generation("r1", 6)))
    cursors = ["", *(chunk.cursor for chunk in chunks)]
    for place, cursor in enumerate(cursors):
        assert await read(attach(stub, "r1", cursor)) == chunks[place:]
    assert len(cursors) == 9


async def test_attach_refuses_what_it_cannot_go_on_from(stub, worker, redis, generation, stream, read):
    chunks = await read(stream(stub, generation("r1")))
    foreign = (await read(stream(stub, generation("r2"))))[1].cursor
    for cursor in (foreign, "x", chunks[1].cursor[:-1], "A" * 44, chunks[1].cursor + "=", "é" * 44):
        error = await failure(read(attach(stub, "r1", cursor)))
        assert (error.code, error.fields[0].field) == ("INVALID_ARGUMENT", "cursor")
    error = await failure(read(attach(stub, "nobody")))
    assert (error.code, error.reason) == ("NOT_FOUND", "REQUEST_NOT_FOUND")
    error = await failure(read(attach(stub, "r1", tenant="other")))
    assert error.code == "NOT_FOUND"
    for request_id in ("", "a b", "x" * 129):
        error = await failure(read(attach(stub, request_id)))
        assert (error.code, error.fields[0].field) == ("INVALID_ARGUMENT", "request_id")
    # As when Redis lost its last second.
    log = RequestKeys("default", "r1").log
    assert await redis.xdel(log, *[id_ for id_, _ in (await redis.xrange(log))[-3:]]) == 3
    error = await failure(read(attach(stub, "r1", chunks[-1].cursor)))
    assert (error.code, error.reason) == ("OUT_OF_RANGE", "CURSOR_BEYOND_END")


async def test_asking_for_unknown_requests_leaves_no_keys(stub, gateway, redis, read):
    before = set(await redis.keys("treadle:request:*"))
    await failure(read(attach(stub, "nobody")))
    error = await failure(stub.Cancel(inference_pb2.CancelRequest(request_id="nobody"), timeout=5))
    assert error.code == "NOT_FOUND"
    assert set(await redis.keys("treadle:request:*")) == before == set()


async def test_cancel_ends_a_running_request(stub, worker, generation, stream, read, eventually):
    worker.hold("r1", 3)
    call = stream(stub, generation("r1", 50))
    assert len(await read(call, 4)) == 4
    request = inference_pb2.CancelRequest(request_id="r1")
    assert (await stub.Cancel(request, timeout=5)).cancelled
    error = await failure(read(call))
    assert error.code == "CANCELLED"
    assert not (await stub.Cancel(request, timeout=5)).cancelled
    worker.hold("r1").release()
    await eventually(lambda: worker.fenced == ["r1"], "the worker's next write fails")


async def test_a_takeover_repeats_nothing(stub, worker, redis, generation, stream, read):
    """An owner that comes later fences, and may say again what was said; the client never hears it twice."""
    worker.hold("r1", 3)
    call = stream(stub, generation("r1", 6))
    head = await read(call, 4)
    request = RequestKeys("default", "r1")
    epoch = await redis.incr(request.epoch)

    def tokens(index: int) -> StreamEntry:
        return StreamEntry(tokens={"index": index, "token_ids": [9], "text": "."})

    later = [
        StreamEntry(fence=Fence(consumer="worker-2")),
        StreamEntry(started=head[0].started),
        tokens(1),
        tokens(2),
        tokens(3),
        tokens(4),
        StreamEntry(terminal={"finished": {"usage": {"output_tokens": 5}}}),
    ]
    for number, entry in enumerate(later):
        assert await worker.append(request, EntryId(epoch, number), entry) is Appended.WRITTEN
    chunks = head + await read(call)
    assert kinds(chunks) == ["started", *["tokens"] * 5, "finished"]
    assert [chunk.tokens.index for chunk in chunks[1:-1]] == [0, 1, 2, 3, 4]
    assert [chunk.tokens.text for chunk in chunks[1:-1]] == ["0 ", "1 ", "2 ", ".", "."]
    for place in range(len(chunks)):
        assert await read(attach(stub, "r1", chunks[place].cursor)) == chunks[place + 1 :]


async def test_a_gap_is_no_answer(stub, worker, generation, stream, read):
    worker.hold("r1")
    call = stream(stub, generation("r1", 6))
    await read(call, 1)
    request = RequestKeys("default", "r1")
    entry = StreamEntry(tokens={"index": 2, "token_ids": [9]})
    assert await worker.append(request, EntryId(1, 2), entry) is Appended.WRITTEN
    error = await failure(read(call))
    assert (error.code, error.reason) == ("DATA_LOSS", "TOKENS_MISSING")


async def test_a_log_that_vanishes_is_said(stub, worker, redis, generation, stream, read):
    worker.hold("r1")
    call = stream(stub, generation("r1", 6))
    await read(call, 1)
    await redis.delete(RequestKeys("default", "r1").log)
    error = await failure(read(call))
    assert (error.code, error.reason) == ("UNAVAILABLE", "REQUEST_LOST")
    assert error.retry_after_s


async def test_a_damaged_log_hurts_only_its_reader(stub, worker, redis, generation, stream, read):
    permits = {name: worker.hold(name) for name in ("bad", "good")}
    bad, good = [stream(stub, generation(name, 6)) for name in ("bad", "good")]
    await read(bad, 1)
    head = await read(good, 1)
    await redis.xadd(RequestKeys("default", "bad").log, {"d": b"\xff\xff"}, id="1-2")
    for _ in range(6):
        permits["good"].release()
    error = await failure(read(bad))
    assert (error.code, error.reason) == ("DATA_LOSS", "QUEUE_ENTRY_DAMAGED")
    assert kinds(head + await read(good)) == ["started", *["tokens"] * 6, "finished"]


async def test_news_that_redis_lost_are_found_by_the_sweep(
    stub, worker, redis, gateway, generation, stream, read
):
    worker.hold("r1")
    call = stream(stub, generation("r1", 6))
    await read(call, 1)
    request = RequestKeys("default", "r1")
    await redis.delete(request.watchers)
    entry = StreamEntry(tokens={"index": 0, "token_ids": [9], "text": "unannounced"})
    assert await worker.append(request, EntryId(1, 2), entry) is Appended.WRITTEN
    (chunk,) = await read(call, 1)
    assert chunk.tokens.text == "unannounced"


async def test_a_worker_error_reaches_the_client(stub, worker, generation, stream, read):
    from treadle.errors import Aborted
    from treadle.rpc import to_status

    worker.hold("r1")
    call = stream(stub, generation("r1", 6))
    await read(call, 1)
    end = StreamEntry(terminal={"error": to_status(Aborted("it kills workers", reason="POISONED"))})
    await worker.append(RequestKeys("default", "r1"), EntryId(1, 2), end)
    error = await failure(read(call))
    assert (error.code, error.reason) == ("ABORTED", "POISONED")

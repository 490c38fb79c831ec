"""Many tasks on one stream: the answers in order, so many at once, each item failing alone."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest

from treadle.api.inference.v1 import inference_pb2
from treadle.api.worker.v1.queue_pb2 import TaskResult, Terminal
from treadle.rpc import from_status
from treadle_gateway.tasks import classification
from treadle_gateway.tasks import run as task_run

pytestmark = pytest.mark.usefixtures("models")
DIGESTS = {
    "Embed": "sha256:vectors",
    "Classify": "sha256:sorter",
    "Tag": "sha256:tagger",
    "Rerank": "sha256:judge",
    "Score": "sha256:artifact",
}


def item(kind: str, request):
    return getattr(inference_pb2, f"{kind}StreamRequest")(request=request)


async def sent(kind: str, requests):
    for one in requests:
        yield item(kind, one)


@pytest.mark.parametrize("kind", DIGESTS)
async def test_an_item_that_fails_in_the_middle_fails_alone(gateway, worker, request_of, kind):
    """Sent as bytes, for one item is no message at all."""
    items = [request_of(kind, f"item{number}") for number in range(12)]
    bad = {"query": ""} if kind == "Rerank" else {"inputs": []}
    items[2] = request_of(kind, "item2", **bad)
    items[5] = request_of(kind, "item5", context={"model": "nobody"})
    items[7] = request_of(kind)
    worker.task_ends["item9"] = Terminal(
        task_result=TaskResult(data=b"x", artifact_digest=DIGESTS[kind], profile="")
    )
    data = [item(kind, one).SerializeToString() for one in items]
    data[4] = b"\x0a\xff\xff\xff\xff\xff no message"

    async def requests():
        for one in data:
            yield one

    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server.port}") as channel:
        await channel.channel_ready()
        method = channel.stream_stream(
            f"/treadle.api.inference.v1.InferenceService/{kind}Stream",
            request_serializer=bytes,
            response_deserializer=getattr(inference_pb2, f"{kind}StreamResponse").FromString,
        )
        answers = [answer async for answer in method(requests(), timeout=20)]
    assert [answer.index for answer in answers] == list(range(12))
    errors = {one.index: from_status(one.error) for one in answers if one.HasField("error")}
    assert {index: (error.code, error.reason) for index, error in errors.items()} == {
        2: ("INVALID_ARGUMENT", "INVALID_FIELD"),
        4: ("INVALID_ARGUMENT", "MALFORMED_MESSAGE"),
        5: ("NOT_FOUND", "MODEL_NOT_FOUND"),
        9: ("INTERNAL", "RESULT_MALFORMED"),
    }
    for answer in answers:
        if answer.index not in errors:
            assert answer.response.profile
            assert answer.response.prompt_tokens
    names = [answer.request_id for answer in answers]
    assert names[7].startswith(f"{kind.lower()}-")
    assert [*names[:4], names[4], *names[5:7], *names[8:]] == [
        *(f"item{number}" for number in range(4)),
        "",
        *(f"item{number}" for number in (5, 6, 8, 9, 10, 11)),
    ]
    print(f"{kind}: {len(errors)} of 12 items failed, alone")


async def test_the_order_is_kept_while_later_items_end_first(stub, worker, request_of, eventually):
    for number in range(10):
        worker.hold(f"item{number}")
    requests = [request_of("Embed", f"item{number}") for number in range(10)]
    call = stub.EmbedStream(sent("Embed", requests), timeout=20)
    await eventually(lambda: len(worker.taken) == 10, "all run")
    for number in reversed(range(10)):
        worker.hold(f"item{number}").release()
        await eventually(lambda number=number: f"item{number}" in worker.finished, "it ends")
    assert worker.finished == [f"item{number}" for number in reversed(range(10))]
    answers = [answer async for answer in call]
    assert [answer.request_id for answer in answers] == [f"item{number}" for number in range(10)]
    assert all(answer.HasField("response") for answer in answers)
    print(f"{len(answers)} answers in order; they were ready in the opposite one")


async def test_no_more_are_read_than_are_unanswered(
    start_gateway, connect_to, worker, request_of, eventually
):
    gateway = await start_gateway(max_batch_in_flight=3)
    stub = await connect_to(gateway)
    for number in range(12):
        worker.hold(f"item{number}")
    requests = [request_of("Embed", f"item{number}") for number in range(12)]
    call = stub.EmbedStream(sent("Embed", requests), timeout=20)
    await eventually(lambda: len(worker.taken) == 3, "three run")
    # Those behind the first one end, and still wait for it.
    for number in (1, 2):
        worker.hold(f"item{number}").release()
        await eventually(lambda number=number: f"item{number}" in worker.finished, "it ends")
    await eventually(lambda: gateway.admission.held == 1, "one is held")
    assert len(worker.taken) == 3
    most = 0
    for number in range(12):
        worker.hold(f"item{number}").release()
        assert (await call.read()).index == number
        most = max(most, gateway.admission.held)
    assert most <= 3
    assert await call.read() is grpc.aio.EOF
    assert len(worker.finished) == 12
    print(f"12 items, at most {most} held at once")


async def test_a_stream_whose_client_leaves_leaves_nothing(stub, gateway, worker, request_of, eventually):
    for number in range(5):
        worker.hold(f"item{number}")

    async def requests():
        for number in range(5):
            yield item("Embed", request_of("Embed", f"item{number}"))
        await asyncio.sleep(60)

    call = stub.EmbedStream(requests(), timeout=60)
    reading = asyncio.create_task(call.read())
    await eventually(lambda: len(worker.taken) == 5, "all run")
    call.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await eventually(
        lambda: gateway.admission.held == len(gateway.follower) == len(gateway.background) == 0,
        "nothing is held",
    )
    for number in range(5):
        worker.hold(f"item{number}").release()
    await eventually(lambda: len(worker.fenced + worker.found_ended) == 5, "all are dropped")
    print(f"{len(worker.fenced + worker.found_ended)} of 5 dropped")


async def test_an_answer_that_is_too_large_to_be_sent_fails_alone(stub, ready, request_of):
    """gRPC itself would end the call, and with it the items behind."""
    labels = ["x" * (9 << 20), "so-so", "good"]
    await ready(wide={"tasks": ["classify"], "labels": labels, "max_input_tokens": 64})
    small = request_of("Classify", context={"model": "wide"}, top_k=1)
    large = request_of("Classify", context={"model": "wide"})
    call = stub.ClassifyStream(sent("Classify", [small, large, small]), timeout=20)
    answers = [answer async for answer in call]
    assert [one.index for one in answers if one.HasField("response")] == [0, 2]
    error = from_status(answers[1].error)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "ANSWER_TOO_LARGE")
    assert [one.field for one in error.fields] == ["inputs"]
    assert "top_k" in error.message
    print(f"1 of {len(answers)} answers could not be sent: {error.message}")


async def test_a_large_result_is_read_in_a_thread(stub, ready, request_of, monkeypatch):
    threads = []
    read = classification._read

    def watched(*given):
        threads.append(threading.current_thread())
        return read(*given)

    monkeypatch.setattr(classification, "_read", watched)
    few, many = {"text": "a b"}, [{"text": f"text {number}"} for number in range(256)]
    await ready(some={"tasks": ["classify"], "labels": ["a", "b", "c"], "max_input_tokens": 64})
    monkeypatch.setattr(task_run, "_LARGE_RESULT_BYTES", 256 * 12)
    for inputs in ([few], many):
        request = request_of("Classify", context={"model": "some"}, inputs=inputs)
        assert len((await stub.Classify(request, timeout=20)).classifications) == len(inputs)
    assert [one is threading.current_thread() for one in threads] == [True, False]
    print(f"{len(many)} inputs were read in {threads[1].name}")

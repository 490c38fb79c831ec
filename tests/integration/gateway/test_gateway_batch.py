"""Many requests on one stream: each answered when it is ready, each failing alone."""

from __future__ import annotations

import asyncio

import grpc

from treadle.api.inference.v1 import inference_pb2
from treadle.rpc import from_status

METHOD = "/treadle.api.inference.v1.InferenceService/BatchGenerate"


async def test_each_item_is_answered_and_fails_alone(gateway, worker, generation):
    """Sent as bytes, for one item is no message at all."""
    items = [generation(f"item{number}", 3 + number) for number in range(12)]
    items[2] = generation("item2", sampling={"temperature": float("nan")})
    items[5] = generation("item5", model="nobody")
    items[7] = generation("", 10)
    items[9] = generation("item9", sampling={"n": 2})
    sent = [inference_pb2.BatchGenerateRequest(generation=item).SerializeToString() for item in items]
    sent[4] = b"\x0a\xff\xff\xff\xff\xff no message"

    async def requests():
        for data in sent:
            yield data

    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server.port}") as channel:
        await channel.channel_ready()
        method = channel.stream_stream(
            METHOD,
            request_serializer=bytes,
            response_deserializer=inference_pb2.BatchGenerateResponse.FromString,
        )
        answers = {answer.index: answer async for answer in method(requests(), timeout=20)}
    assert sorted(answers) == list(range(12))
    errors = {index: from_status(one.error) for index, one in answers.items() if one.HasField("error")}
    assert {index: error.code for index, error in errors.items()} == {
        2: "INVALID_ARGUMENT",
        4: "INVALID_ARGUMENT",
        5: "NOT_FOUND",
        9: "UNIMPLEMENTED",
    }
    assert errors[2].fields[0].field == "generation.sampling.temperature"
    assert errors[4].reason == "MALFORMED_MESSAGE"
    assert errors[9].fields[0].field == "generation.sampling.n"
    for index, answer in answers.items():
        if index not in errors:
            assert answer.response.usage.output_tokens == 3 + index
            assert answer.request_id == answer.response.started.request_id
    assert answers[5].request_id == "item5"
    assert answers[7].request_id.startswith("gen-")
    print(f"{len(errors)} of 12 items failed, alone")


async def test_answers_come_as_they_are_ready(stub, worker, generation):
    slow = worker.hold("slow")

    async def requests():
        for name in ("slow", "quick"):
            yield inference_pb2.BatchGenerateRequest(generation=generation(name, 2))

    order = []
    async for answer in stub.BatchGenerate(requests(), timeout=20):
        order.append(answer.request_id)
        slow.release()
        slow.release()
    assert order == ["quick", "slow"]


async def test_no_more_are_read_than_run(start_gateway, connect_to, worker, generation, eventually):
    gateway = await start_gateway(max_batch_in_flight=3)
    stub = await connect_to(gateway)
    for number in range(9):
        worker.hold(f"item{number}")

    async def requests():
        for number in range(9):
            yield inference_pb2.BatchGenerateRequest(generation=generation(f"item{number}", 1))

    call = stub.BatchGenerate(requests(), timeout=20)
    await eventually(lambda: len(worker.taken) == 3, "three run")
    await asyncio.sleep(0.3)
    assert gateway.admission.held == len(worker.taken) == 3
    most = 0
    for number in range(9):
        worker.hold(f"item{number}").release()
        await call.read()
        most = max(most, gateway.admission.held)
    assert most <= 3
    assert await call.read() is grpc.aio.EOF
    assert len(worker.finished) == 9


async def test_a_batch_whose_client_leaves_leaves_nothing(
    stub, gateway, worker, redis, generation, eventually
):
    for number in range(5):
        worker.hold(f"item{number}", 1)

    async def requests():
        for number in range(5):
            yield inference_pb2.BatchGenerateRequest(generation=generation(f"item{number}", 90))
        await asyncio.sleep(60)

    call = stub.BatchGenerate(requests(), timeout=60)
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

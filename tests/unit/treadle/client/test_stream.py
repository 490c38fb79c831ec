"""Streams that lose their connection, against a gateway that keeps each request's log."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from treadle.api.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from treadle.client import AsyncClient, Client, GenerationRequest
from treadle.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    invalid_field,
)
from treadle.rpc import RpcServer, to_status

SERVICE = "treadle.api.inference.v1.InferenceService"


def log_of(generation: generation_pb2.Generation) -> list[generation_pb2.GenerateChunk]:
    """The chunks of an answer that has two choices of max_new_tokens tokens each."""
    length = generation.stopping.max_new_tokens
    chunks = [
        generation_pb2.GenerateChunk(
            started={
                "request_id": generation.request_id,
                "artifact_digest": "sha256:ab",
                "profile": "p-1",
                "prompt_tokens": 4,
                "seed": 7,
            }
        )
    ]
    chunks += [
        generation_pb2.GenerateChunk(
            tokens={
                "choice": choice,
                "index": place,
                "token_ids": [100 * choice + place],
                "text": f"{place} ",
            }
        )
        for place in range(length)
        for choice in (0, 1)
    ]
    finishes = [{"choice": choice, "finish_reason": generation_pb2.FINISH_REASON_LENGTH} for choice in (0, 1)]
    usage = {"prompt_tokens": 4, "output_tokens": 2 * length}
    chunks.append(generation_pb2.GenerateChunk(finished={"choices": finishes, "usage": usage}))
    for place, chunk in enumerate(chunks):
        chunk.cursor = f"c{place}"
    return chunks


class Gateway(inference_pb2_grpc.InferenceServiceServicer):
    """Loses the connection wherever `losses` says: the number of chunks that a call still sends."""

    def __init__(self) -> None:
        self.logs: dict[str, list[generation_pb2.GenerateChunk]] = {}
        self.losses: list[int] = []
        self.calls: list[str] = []
        self.drop: int | None = None
        self.cancelled: list[str] = []
        self.hold = asyncio.Event()
        self.somebody_left = asyncio.Event()

    def _fail(self, generation: generation_pb2.Generation) -> None:
        if generation.model == "full":
            raise ResourceExhausted("full", retry_after_s=3.0)
        if generation.model == "bad":
            raise invalid_field("generation.model", "is bad")

    async def _send(self, chunks):
        allowed = self.losses.pop(0) if self.losses else len(chunks)
        for place, chunk in enumerate(chunks):
            if place == allowed:
                raise Unavailable("the connection is lost", reason="TEST_LOSS")
            if chunk.cursor == f"c{self.drop}":
                continue
            yield chunk

    async def GenerateStream(self, request, context):
        self.calls.append("stream")
        self._fail(request.generation)
        if request.generation.model == "slow":
            try:
                yield inference_pb2.GenerateStreamResponse(chunk=log_of(request.generation)[0])
                yield inference_pb2.GenerateStreamResponse(chunk=log_of(request.generation)[1])
                await self.hold.wait()
            finally:
                self.somebody_left.set()
        log = self.logs.setdefault(request.generation.request_id, log_of(request.generation))
        async for chunk in self._send(log):
            yield inference_pb2.GenerateStreamResponse(chunk=chunk)

    async def Attach(self, request, context):
        self.calls.append(f"attach {request.cursor}")
        if request.request_id not in self.logs:
            raise NotFound("no such request")
        after = int(request.cursor[1:]) + 1 if request.cursor else 0
        async for chunk in self._send(self.logs[request.request_id][after:]):
            yield inference_pb2.AttachResponse(chunk=chunk)

    async def Generate(self, request, context):
        self.calls.append(f"generate {request.generation.request_id}")
        self._fail(request.generation)
        if self.losses:
            self.losses.pop()
            raise Unavailable("the connection is lost")
        return self._whole(request.generation)

    def _whole(self, generation):
        log = log_of(generation)
        ids = list(range(generation.stopping.max_new_tokens))
        return inference_pb2.GenerateResponse(
            started=log[0].started,
            choices=[{"text": generation.text, "token_ids": ids, "finish_reason": 3}],
            usage=log[-1].finished.usage,
        )

    async def Cancel(self, request, context):
        self.cancelled.append(request.request_id)
        return inference_pb2.CancelResponse(cancelled=True)

    async def BatchGenerate(self, request_iterator, context):
        allowed = self.losses.pop(0) if self.losses else None
        index = 0
        async for request in request_iterator:
            self.calls.append(request.generation.request_id)
            if index == allowed:
                raise Unavailable("the connection is lost")
            response = inference_pb2.BatchGenerateResponse(
                request_id=request.generation.request_id, index=index
            )
            try:
                self._fail(request.generation)
                response.response.CopyFrom(self._whole(request.generation))
            except (ResourceExhausted, InvalidArgument) as error:
                response.error.CopyFrom(to_status(error))
            yield response
            index += 1

    async def ListModels(self, request, context):
        start = int(request.page_token or 0)
        models = [{"model": f"m{start}", "artifact_digest": "sha256:ab", "ready_workers": 1}]
        return inference_pb2.ListModelsResponse(
            models=models, next_page_token=str(start + 1) if start < 2 else ""
        )


@pytest.fixture
async def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
async def server(gateway: Gateway) -> AsyncIterator[RpcServer]:
    server = RpcServer("127.0.0.1:0")
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, gateway, SERVICE)
    async with server.running(0.1):
        yield server


@pytest.fixture
async def client(server: RpcServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{server.port}", model="m") as client:
        yield client


async def test_a_stream_survives_losses_anywhere(client, gateway):
    rng = random.Random(5)
    lost = 0
    for _ in range(12):
        length = rng.randint(1, 12)
        gateway.losses = [rng.randint(0, 4) for _ in range(rng.randint(0, 5))]
        stream = client.stream("x", max_new_tokens=length, n=2)
        seen = [(chunk.choice, chunk.index, *chunk.token_ids) async for chunk in stream]
        assert seen == [(c, place, 100 * c + place) for place in range(length) for c in (0, 1)]
        answer = stream.answer
        assert [choice.token_ids for choice in answer.choices] == [
            tuple(range(length)),
            tuple(range(100, 100 + length)),
        ]
        assert answer.text == "".join(f"{place} " for place in range(length))
        assert (answer.prompt.model_digest, answer.prompt.request_id) == ("sha256:ab", stream.request_id)
        assert answer.usage.output_tokens == 2 * length
        assert answer.choices[0].finish_reason == "length"
        lost += stream.reconnections
    attached = [call for call in gateway.calls if call.startswith("attach")]
    print(f"{lost} losses, {len(attached)} times attached")
    assert lost >= 10
    assert len(attached) >= 5


async def test_a_stream_survives_the_gateway_itself(server, gateway):
    """The gateway goes away in mid-stream, and another comes up at its address."""
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        stream = client.stream("x", model="slow", max_new_tokens=6)
        gateway.logs[stream.request_id] = log_of(
            generation_pb2.Generation(request_id=stream.request_id, stopping={"max_new_tokens": 6})
        )
        first = await anext(stream)
        await server.stop(0)
        second = RpcServer(f"127.0.0.1:{server.port}")
        second.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, gateway, SERVICE)
        async with second.running(0.1):
            rest = [chunk async for chunk in stream]
    assert [first.index, *(chunk.index for chunk in rest if chunk.choice == 0)] == list(range(6))
    assert stream.reconnections >= 1
    assert gateway.calls[-1] == "attach c1"


async def test_a_missing_token_is_noticed(client, gateway):
    gateway.drop = 5
    with pytest.raises(DataLoss, match="token 2 of choice 0"):
        await client.stream("x", max_new_tokens=6).collect()


async def test_tries_are_bounded(server, gateway):
    gateway.losses = [0] * 50
    async with AsyncClient(f"127.0.0.1:{server.port}", model="m", reconnects=2) as client:
        with pytest.raises(Unavailable) as caught:
            await client.stream("x", max_new_tokens=6).collect()
    assert caught.value.reason == "TEST_LOSS"
    assert len(gateway.calls) == 3


async def test_errors_are_not_tried_again(client, gateway):
    with pytest.raises(ResourceExhausted) as caught:
        await client.stream("x", model="full").collect()
    assert caught.value.retry_after_s == 3.0
    with pytest.raises(InvalidArgument) as refused:
        await client.generate("x", model="bad")
    assert refused.value.fields[0].field == "generation.model"
    assert len(gateway.calls) == 2


async def test_deadlines_hold(client):
    with pytest.raises(DeadlineExceeded):
        await client.stream("x", model="slow", max_new_tokens=2, timeout_s=0.3).collect()


async def test_leaving_drops_the_connection(client, gateway):
    async with client.stream("x", model="slow", max_new_tokens=5) as stream:
        assert (await anext(stream)).token_ids == (0,)
        with pytest.raises(FailedPrecondition):
            _ = stream.answer
    async with asyncio.timeout(5):
        await gateway.somebody_left.wait()
    assert await client.cancel(stream.request_id)
    assert gateway.cancelled == [stream.request_id]


async def test_attach_starts_after_a_cursor(client, gateway):
    whole = client.stream("x", max_new_tokens=5)
    chunks = [chunk async for chunk in whole]
    for place in range(len(chunks)):
        attached = client.attach(whole.request_id, chunks[place].cursor)
        assert [chunk async for chunk in attached] == chunks[place + 1 :]
        assert attached.answer.usage == whole.answer.usage
    assert await client.attach(whole.request_id).collect() == whole.answer
    with pytest.raises(NotFound):
        await client.attach("nobody").collect()


async def test_generate_keeps_its_id_when_tried_again(client, gateway):
    gateway.losses = [0, 0]
    answer = await client.generate("hello", max_new_tokens=3)
    assert (answer.text, answer.token_ids) == ("hello", (0, 1, 2))
    assert len(gateway.calls) == 3
    assert len(set(gateway.calls)) == 1


async def test_batch_answers_each_once_whatever_is_lost(client, gateway):
    rng = random.Random(9)
    gateway.losses = [3, 0, 11, 1]
    models = [rng.choice(["m", "m", "m", "full", "bad"]) for _ in range(60)]

    async def requests():
        for number, model in enumerate(models):
            await asyncio.sleep(0)
            yield GenerationRequest(prompt=f"text {number}", model=model, max_new_tokens=2)

    items = {item.index: item async for item in client.batch(requests(), window=8)}
    assert sorted(items) == list(range(60))
    answered = 0
    for number, model in enumerate(models):
        if model == "m":
            assert items[number].result().text == f"text {number}"
            answered += 1
        else:
            with pytest.raises(ResourceExhausted if model == "full" else InvalidArgument):
                items[number].result()
    print(f"{answered} answered, {60 - answered} refused, {len(gateway.calls)} sent")
    assert 20 < answered < 60
    assert len(gateway.calls) > 60
    assert not gateway.losses


async def test_a_batch_passes_on_what_its_requests_raise(client):
    def requests():
        yield GenerationRequest(prompt="one", request_id="one", max_new_tokens=1)
        raise ZeroDivisionError

    answered = 0
    with pytest.raises(ZeroDivisionError):
        async for _ in client.batch(requests()):
            answered += 1
    assert answered == 1
    assert [item async for item in client.batch([])] == []


async def test_models_come_page_by_page(client):
    assert [model.name for model in await client.models()] == ["m0", "m1", "m2"]


async def test_the_same_without_an_event_loop(server, gateway):
    gateway.losses = [3]

    def use() -> list[object]:
        with Client(f"127.0.0.1:{server.port}", model="m") as client:
            with client.stream("x", max_new_tokens=4) as stream:
                ids = [chunk.token_ids for chunk in stream if chunk.choice == 0]
            again = [chunk.token_ids for chunk in client.attach(stream.request_id) if chunk.choice == 0]
            batch = [item.index for item in client.batch([GenerationRequest(prompt="y", max_new_tokens=1)])]
            answer = client.generate("z", max_new_tokens=2)
            with client.stream("x", model="slow", max_new_tokens=4) as slow:
                next(slow)
            cancelled = client.cancel(slow.request_id)
            return [ids, again, batch, answer.text, stream.answer.token_ids, cancelled, len(client.models())]

    ids, again, batch, text, collected, cancelled, models = await asyncio.to_thread(use)
    assert ids == again == [(0,), (1,), (2,), (3,)]
    assert (batch, text, collected, cancelled, models) == ([0], "z", (0, 1, 2, 3), True, 3)
    assert gateway.somebody_left.is_set()

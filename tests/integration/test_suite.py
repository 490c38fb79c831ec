"""The main job through every service: gateway, tokenizer, registry, Redis, worker, the real model."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from treadle.api.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from treadle.api.training.v1 import training_pb2, training_pb2_grpc
from treadle.rpc import from_rpc_error, open_channel

SERVICES = {
    "gateway": "treadle.api.inference.v1.InferenceService",
    "registry": "treadle.api.registry.v1.RegistryService",
    "tokenizer": "treadle.api.tokenizer.v1.TokenizerService",
    "trainer": "treadle.api.training.v1.TrainingService",
    "worker": "treadle.api.worker.v1.WorkerService",
}
WORDS = (
    "the a river city of loom thread weaver red blue seven quickly turned and because under over time".split()
)


@pytest.fixture
async def stub(suite) -> AsyncIterator[inference_pb2_grpc.InferenceServiceAsyncStub]:
    async with open_channel(suite.addresses["gateway"]) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def generation(text: str, max_new_tokens: int, **fields) -> generation_pb2.Generation:
    stopping = {"max_new_tokens": max_new_tokens} | fields.pop("stopping", {})
    sampling = {"temperature": 0.0} | fields.pop("sampling", {})
    return generation_pb2.Generation(
        model="smollm2", text=text, stopping=stopping, sampling=sampling, **fields
    )


async def stream(stub, asked: generation_pb2.Generation) -> list[generation_pb2.GenerateChunk]:
    call = stub.GenerateStream(inference_pb2.GenerateStreamRequest(generation=asked), timeout=240)
    return [response.chunk async for response in call]


def check_order(chunks: list[generation_pb2.GenerateChunk]) -> tuple[list[int], str]:
    """Started, then tokens without a gap, then finished; gives the ids and the text."""
    kinds = [chunk.WhichOneof("chunk") for chunk in chunks]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) <= {"tokens"}
    assert len({chunk.cursor for chunk in chunks}) == len(chunks)
    ids: list[int] = []
    for chunk in chunks[1:-1]:
        assert chunk.tokens.index == len(ids)
        ids += chunk.tokens.token_ids
    assert chunks[-1].finished.usage.output_tokens == len(ids)
    return ids, "".join(chunk.tokens.text for chunk in chunks[1:-1])


async def test_a_stream_tells_the_whole_story(stub):
    chunks = await stream(stub, generation("The capital of France is", 8, output={"logprobs": 3}))
    ids, text = check_order(chunks)
    started, finished = chunks[0].started, chunks[-1].finished
    assert text.startswith(" Paris")
    assert len(ids) == 8
    assert started.artifact_digest.startswith("sha256:")
    assert started.profile.startswith("p-")
    assert started.prompt_tokens == finished.usage.prompt_tokens == 5
    assert finished.choices[0].finish_reason == generation_pb2.FINISH_REASON_LENGTH
    logprobs = [entry for chunk in chunks[1:-1] for entry in chunk.tokens.logprobs]
    assert len(logprobs) == 8
    assert all(len(entry.top) == 3 and entry.top[0].logprob == entry.logprob <= 0 for entry in logprobs)


async def test_unary_and_stream_agree(stub):
    asked = generation("Weaving is the craft of", 24)
    ids, text = check_order(await stream(stub, asked))
    answer = await stub.Generate(inference_pb2.GenerateRequest(generation=asked), timeout=120)
    assert list(answer.choices[0].token_ids) == ids
    assert answer.choices[0].text == text


async def test_chat_ends_by_itself(stub):
    messages = [{"role": "user", "content": "Say hello in one short sentence."}]
    asked = generation_pb2.Generation(
        model="smollm2",
        chat={"messages": messages},
        sampling={"temperature": 0.0},
        stopping={"max_new_tokens": 64},
    )
    ids, text = check_order(chunks := await stream(stub, asked))
    assert chunks[-1].finished.choices[0].finish_reason == generation_pb2.FINISH_REASON_STOP_TOKEN
    assert text.strip()
    assert "<|im_end|>" not in text
    print(f"{len(ids)} tokens: {text!r}")


async def test_a_stop_string_is_cut_across_tokens(stub):
    whole = check_order(await stream(stub, generation("One, two, three, four,", 24)))[1]
    stop = whole[9:14]
    chunks = await stream(stub, generation("One, two, three, four,", 24, stopping={"stop_strings": [stop]}))
    _, text = check_order(chunks)
    assert text == whole[: whole.index(stop)]
    assert chunks[-1].finished.choices[0].finish_reason == generation_pb2.FINISH_REASON_STOP_STRING
    assert chunks[-1].finished.choices[0].stop_string == stop


async def test_64_clients_at_once_get_what_they_would_get_alone(suite):
    rng = random.Random(64)
    asked = []
    for number in range(64):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 120)))
        sampling = {} if number % 2 else {"temperature": 0.8, "top_p": 0.9, "seed": number}
        stopping = {"ignore_eos": True}
        asked.append(generation(text, rng.randint(1, 40), sampling=sampling, stopping=stopping))

    async def client(one: generation_pb2.Generation) -> list[int]:
        async with open_channel(suite.addresses["gateway"]) as channel:
            return check_order(await stream(inference_pb2_grpc.InferenceServiceStub(channel), one))[0]

    together = await asyncio.gather(*(client(one) for one in asked))
    assert [len(ids) for ids in together] == [one.stopping.max_new_tokens for one in asked]
    alone = {number: await client(asked[number]) for number in rng.sample(range(64), 16)}
    assert len(alone) == 16
    for number, ids in alone.items():
        assert ids == together[number], f"request {number} depends on its neighbours"
    print(f"64 whole answers, {sum(map(len, together))} tokens; {len(alone)} again alone, all equal")


async def test_a_seed_fixes_the_draws(stub):
    asked = generation("Once upon a time", 16, sampling={"temperature": 1.0, "seed": 11})
    first, second = [check_order(await stream(stub, asked))[0] for _ in range(2)]
    other = generation("Once upon a time", 16, sampling={"temperature": 1.0, "seed": 12})
    assert first == second != check_order(await stream(stub, other))[0]
    unseeded = generation("Once upon a time", 16, sampling={"temperature": 1.0})
    chunks = await stream(stub, unseeded)
    again = generation("Once upon a time", 16, sampling={"temperature": 1.0, "seed": chunks[0].started.seed})
    assert check_order(await stream(stub, again))[0] == check_order(chunks)[0]


async def test_attach_goes_on_after_every_cursor(stub):
    asked = generation("Rivers run to", 12, request_id=f"attach-{uuid.uuid4().hex}")
    chunks = await stream(stub, asked)
    attached = 0
    for place in range(len(chunks)):
        cursor = chunks[place - 1].cursor if place else ""
        request = inference_pb2.AttachRequest(request_id=asked.request_id, cursor=cursor)
        rest = [response.chunk async for response in stub.Attach(request, timeout=30)]
        assert rest == chunks[place:]
        attached += 1
    print(f"attached {attached} times")
    assert attached >= 3


async def test_cancel_ends_a_running_request_and_others_go_on(stub):
    request_id = f"cancel-{uuid.uuid4().hex}"
    asked = generation("Count: 1, 2, 3,", 1500, request_id=request_id, stopping={"ignore_eos": True})
    other = asyncio.create_task(stream(stub, generation("The other one", 30, stopping={"ignore_eos": True})))
    received = 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for response in stub.GenerateStream(
            inference_pb2.GenerateStreamRequest(generation=asked), timeout=120
        ):
            received += response.chunk.WhichOneof("chunk") == "tokens"
            if received == 3:
                request = inference_pb2.CancelRequest(request_id=request_id)
                assert (await stub.Cancel(request, timeout=10)).cancelled
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert 3 <= received < 100
    assert len(check_order(await other)[0]) == 30
    assert not (await stub.Cancel(inference_pb2.CancelRequest(request_id=request_id), timeout=10)).cancelled


async def test_batch_answers_each_and_fails_alone(stub):
    rng = random.Random(3)
    lengths = [rng.randint(1, 12) for _ in range(24)]

    async def requests():
        for number, length in enumerate(lengths):
            bad = {"sampling": {"temperature": -1.0}} if number % 6 == 5 else {}
            asked = generation(f"Item {number}:", length, request_id=f"b{number}-{uuid.uuid4().hex}", **bad)
            asked.stopping.ignore_eos = True
            yield inference_pb2.BatchGenerateRequest(generation=asked)

    outcomes = {}
    async for response in stub.BatchGenerate(requests(), timeout=120):
        outcomes[response.index] = response
    assert sorted(outcomes) == list(range(24))
    failed = [number for number, outcome in outcomes.items() if outcome.HasField("error")]
    assert sorted(failed) == [5, 11, 17, 23]
    for number, outcome in outcomes.items():
        if number in failed:
            assert outcome.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        else:
            assert len(outcome.response.choices[0].token_ids) == lengths[number]


async def test_one_id_runs_once(stub):
    asked = generation(
        "Again and again", 20, request_id=f"once-{uuid.uuid4().hex}", sampling={"temperature": 1.0}
    )
    streams = await asyncio.gather(*(stream(stub, asked) for _ in range(20)))
    assert all(chunks == streams[0] for chunks in streams)
    asked.text = "Something else"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream(stub, asked)
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"model": "nobody"}, "NOT_FOUND", None),
        ({"text": ""}, "INVALID_ARGUMENT", "generation.text"),
        ({"sampling": {"top_p": 2.0}}, "INVALID_ARGUMENT", "generation.sampling.top_p"),
        ({"sampling": {"temperature": float("nan")}}, "INVALID_ARGUMENT", "generation.sampling.temperature"),
        ({"stopping": {"max_new_tokens": 0}}, "INVALID_ARGUMENT", "generation.stopping.max_new_tokens"),
        ({"token_ids": {"ids": [1, 49152]}}, "INVALID_ARGUMENT", "generation.token_ids.ids[1]"),
        ({"text": "word " * 9000}, "INVALID_ARGUMENT", "generation.text"),
    ],
)
async def test_bad_requests_name_their_field(stub, change, code, field):
    asked = generation_pb2.Generation(**({"model": "smollm2", "text": "Hello"} | change))
    if "token_ids" in change:
        asked = generation_pb2.Generation(model="smollm2", **change)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream(stub, asked)
    error = from_rpc_error(caught.value)
    assert error.code == code
    if field:
        assert field in [violation.field for violation in error.fields]
    assert len(check_order(await stream(stub, generation("Still there", 2)))[0]) == 2


@pytest.mark.parametrize("service", SERVICES)
async def test_every_service_has_health_and_reflection(suite, service):
    async with open_channel(suite.addresses[service]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "liveness", SERVICES[service]):
            status = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert status.status == health_pb2.HealthCheckResponse.SERVING, name
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICES[service])
        async for response in reflection.ServerReflectionInfo(iter([request]), timeout=10):
            assert response.file_descriptor_response.file_descriptor_proto


async def test_the_trainer_says_that_it_has_no_code_yet(suite):
    async with open_channel(suite.addresses["trainer"]) as channel:
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CreateJob(training_pb2.CreateJobRequest(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_logs_are_json_and_follow_the_request(stub, suite):
    request_id = f"logged-{uuid.uuid4().hex}"
    secret = "unmistakable heliotrope wording"
    await stream(stub, generation(secret, 3, request_id=request_id))
    await asyncio.sleep(1.0)
    for service in ("gateway", "worker"):
        lines = [line for line in suite.log(service) if line.get("request_id") == request_id]
        assert lines, f"{service} logged nothing of {request_id}"
        assert all(line["service"] == service for line in lines)
    for service in SERVICES:
        assert not [line for line in suite.log(service) if secret in str(line)]

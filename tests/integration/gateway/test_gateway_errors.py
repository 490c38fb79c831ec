"""What a client is told when something is wrong: with its request, its model, or the suite."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from treadle.api.inference.v1 import inference_pb2
from treadle.api.worker.v1.queue_pb2 import WORKER_STATE_LOADING
from treadle.queue.workers import beat, leave
from treadle.rpc import from_rpc_error, open_channel


async def failure(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def generate(stub, asked, timeout: float = 10):
    return stub.Generate(inference_pb2.GenerateRequest(generation=asked), timeout=timeout)


@pytest.mark.parametrize(
    ("change", "code", "reason", "field"),
    [
        ({"model": "nobody"}, "NOT_FOUND", "MODEL_NOT_FOUND", "generation.model"),
        ({"model": "asleep"}, "UNAVAILABLE", "MODEL_NOT_SERVED", None),
        ({"profile": "p-other"}, "FAILED_PRECONDITION", "PROFILE_NOT_SERVED", "generation.profile"),
        ({"model": "asleep", "profile": "p-tiny"}, "UNAVAILABLE", "MODEL_NOT_SERVED", None),
        (
            {"token_ids": {"ids": [1], "tokenizer_digest": "sha256:x"}},
            "FAILED_PRECONDITION",
            "TOKENIZER_MISMATCH",
            "generation.token_ids.tokenizer_digest",
        ),
        (
            {"token_ids": {"ids": [1, 300]}},
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "generation.token_ids.ids[1]",
        ),
        ({"text": ""}, "INVALID_ARGUMENT", "INVALID_FIELD", "generation.text"),
        ({"text": "x" * 10_000}, "INVALID_ARGUMENT", "INVALID_FIELD", "generation.text"),
        ({"text": "bad text"}, "INVALID_ARGUMENT", "INVALID_FIELD", "generation.text"),
        (
            {"chat": {"messages": [{"role": "user"}, {"role": "villain"}]}},
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "generation.chat.messages[1].role",
        ),
        ({"count": 9_996}, "INVALID_ARGUMENT", "INVALID_FIELD", "generation.stopping.max_new_tokens"),
        ({"count": 2**32 - 1}, "INVALID_ARGUMENT", "INVALID_FIELD", "generation.stopping.max_new_tokens"),
        ({"request_id": "{x}"}, "INVALID_ARGUMENT", "INVALID_FIELD", "generation.request_id"),
        ({"adapter": "a"}, "UNIMPLEMENTED", "UNIMPLEMENTED", "generation.adapter"),
        (
            {"stopping": {"stop_strings": [str(number) for number in range(10_000)]}},
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "generation.stopping.stop_strings",
        ),
    ],
)
async def test_a_bad_request_is_refused_and_the_next_one_served(
    stub, worker, generation, stream, read, change, code, reason, field
):
    for call in (generate(stub, generation(**change)), read(stream(stub, generation(**change)))):
        error = await failure(call)
        assert (error.code, error.reason) == (code, reason)
        assert [one.field for one in error.fields] == ([field] if field else [])
        assert (error.retry_after_s is not None) == (code == "UNAVAILABLE")
    assert (await generate(stub, generation())).usage.output_tokens == 5
    assert len(worker.taken) == 1


async def test_nobody_ready_is_said_at_once(stub, worker, redis, generation):
    for change in ("loading", "gone"):
        await asyncio.sleep(0.6)
        if change == "loading":
            await beat(redis, worker.heartbeat(state=WORKER_STATE_LOADING))
        else:
            await leave(redis, worker.consumer)
        error = await failure(generate(stub, generation(profile="p-tiny")))
        assert (error.code, error.reason) == ("UNAVAILABLE", "MODEL_NOT_SERVED")


async def test_a_retry_finds_its_answer_when_nobody_serves_any_more(stub, worker, redis, generation):
    first = await generate(stub, generation("r1"))
    await leave(redis, worker.consumer)
    await asyncio.sleep(0.6)
    assert await generate(stub, generation("r1")) == first
    assert (await failure(generate(stub, generation("r2")))).code == "UNAVAILABLE"


async def test_the_gateway_goes_on_while_the_registry_is_away(
    stub, gateway, worker, registry_server, fake_registry, generation, eventually
):
    await generate(stub, generation())
    await eventually(lambda: gateway.server.ready, "it is ready")
    await registry_server.stop(0)
    await asyncio.sleep(2.1)
    assert (await generate(stub, generation())).usage.output_tokens == 5
    calls = fake_registry.calls
    error = await failure(generate(stub, generation(model="sha256:unheard-of")))
    assert (error.code, error.reason) == ("UNAVAILABLE", "REGISTRY_UNAVAILABLE")
    assert error.retry_after_s
    models = (await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)).models
    assert [(model.model, model.ready_workers) for model in models] == [("tiny", 1)]
    assert gateway.server.ready
    assert fake_registry.calls == calls == 1


async def test_a_slow_tokenizer_is_waited_for_as_long_as_allowed(
    start_gateway, connect_to, worker, generation
):
    stub = await connect_to(await start_gateway(tokenizer_timeout_s=0.3))
    chat = {"messages": [{"role": "user", "content": "x"}], "template_arguments_json": '{"slow": 1}'}
    error = await failure(generate(stub, generation(chat=chat)))
    assert (error.code, error.reason) == ("UNAVAILABLE", "TOKENIZER_TIMEOUT")
    short = generation(chat=chat, timeout=duration_pb2.Duration(nanos=100_000_000))
    assert (await failure(generate(stub, short))).code == "DEADLINE_EXCEEDED"


async def test_without_redis_everybody_is_told(start_gateway, connect_to, generation):
    gateway = await start_gateway(redis_url="redis://127.0.0.1:1/0", redis_patience_s=0.1)
    stub = await connect_to(gateway)
    calls = (
        generate(stub, generation()),
        generate(stub, generation("r1")),
        stub.Cancel(inference_pb2.CancelRequest(request_id="r1"), timeout=10),
        stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10),
    )
    for call in calls:
        error = await failure(call)
        assert (error.code, error.reason) == ("UNAVAILABLE", "REDIS_UNAVAILABLE")
        assert error.retry_after_s
    assert not gateway.server.ready


async def test_ready_when_all_it_needs_is_there(gateway, tokenizer_server, eventually):
    async with open_channel(f"127.0.0.1:{gateway.server.port}") as channel:
        await channel.channel_ready()
        health = health_pb2_grpc.HealthStub(channel)

        async def status(service: str = "") -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            return (await health.Check(request, timeout=5)).status

        async def is_ready() -> bool:
            return await status() == health_pb2.HealthCheckResponse.SERVING

        async def is_not_ready() -> bool:
            return not await is_ready()

        await eventually(is_ready, "it is ready")
        assert await status("treadle.api.inference.v1.InferenceService") == 1
        await tokenizer_server.set_ready(False)
        await eventually(is_not_ready, "the tokenizer is missed")
        assert await status("liveness") == 1
        await tokenizer_server.set_ready(True)
        await eventually(is_ready, "it is ready again")


async def test_models_are_listed_page_by_page(stub, worker, redis):
    second = worker.heartbeat(profile="p-2", artifact_digest="sha256:b")
    second.consumer = "worker-2"
    second.profiles.append(worker.heartbeat().profiles[0])
    await beat(redis, second)
    request = inference_pb2.ListModelsRequest(page_size=1)
    pages = [await stub.ListModels(request, timeout=10)]
    while pages[-1].next_page_token:
        request.page_token = pages[-1].next_page_token
        pages.append(await stub.ListModels(request, timeout=10))
    assert [
        (one.model, one.artifact_digest, one.profile, one.ready_workers, one.max_model_len, one.vocab_size)
        for page in pages
        for one in page.models
    ] == [
        ("sha256:b", "sha256:b", "p-2", 1, 10_000, 300),
        ("tiny", "sha256:artifact", "p-tiny", 2, 10_000, 300),
    ]
    for bad, field in (({"page_size": -1}, "page_size"), ({"page_token": "x"}, "page_token")):
        error = await failure(stub.ListModels(inference_pb2.ListModelsRequest(**bad), timeout=10))
        assert (error.code, error.fields[0].field) == ("INVALID_ARGUMENT", field)


async def test_what_cannot_be_decoded_is_said(gateway):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server.port}") as channel:
        await channel.channel_ready()
        method = channel.unary_unary("/treadle.api.inference.v1.InferenceService/Generate")
        error = await failure(method(b"\xff\xff", timeout=5))
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")
        error = await failure(method(b"\x0a" + b"\x00" * (17 << 20), timeout=10))
        assert error.code == "RESOURCE_EXHAUSTED"


async def test_a_stream_outlives_its_connections_to_redis(
    stub, gateway, worker, redis, generation, stream, read
):
    worker.hold("r1")
    call = stream(stub, generation("r1", 4))
    await read(call, 1)
    killed = 0
    for client in await redis.client_list():
        # Not the scripted worker's, which is no part of this.
        if client["cmd"] != "xreadgroup":
            killed += await redis.client_kill_filter(_id=client["id"], skipme=True)
    for _ in range(4):
        worker.hold("r1").release()
    assert len(await read(call)) == 5
    print(f"{killed} connections were cut")
    assert killed >= 2

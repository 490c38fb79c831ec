"""The tokenizer when a model, a template, a text or the registry is not as it should be."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2
from tokenizer_process import (
    HeldRegistry,
    Service,
    children_of,
    failure,
    inputs,
    is_there,
    readiness,
    running_registry,
    running_service,
    until_ready,
)
from tokenizers import Tokenizer as Backend

from treadle.api.tokenizer.v1 import tokenizer_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOSTILE = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MESSAGES = [pb.Message(role="system", content="Be brief."), pb.Message(role="user", content="Hello 👍🏽")]


async def test_unknown_models_and_models_without_a_template(service: Service, tmp_path: Path) -> None:
    error = await failure(service.stub.Encode(pb.EncodeRequest(model="nobody", inputs=inputs("a"))))
    assert (error.code, error.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    (tmp_path / "tokenizer.json").write_bytes((service.folder / "tokenizer.json").read_bytes())
    service.registry.add("base", tmp_path, number=3)
    error = await failure(service.stub.RenderChat(pb.RenderChatRequest(model="base", messages=MESSAGES)))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "NO_CHAT_TEMPLATE")
    service.registry.add("broken", tmp_path / "nowhere", number=4)
    error = await failure(service.stub.Encode(pb.EncodeRequest(model="broken", inputs=inputs("a"))))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "TOKENIZER_NOT_LOADABLE")


async def test_a_hostile_template_hurts_only_its_own_requests(service: Service, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((service.folder / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(HOSTILE)
    service.registry.add("hostile", tmp_path, number=5)
    hostile = [
        asyncio.create_task(
            failure(
                service.stub.RenderChat(pb.RenderChatRequest(model="hostile", messages=MESSAGES), timeout=30)
            )
        )
        for _ in range(2)
    ]
    served = 0
    while not all(task.done() for task in hostile):
        await service.stub.CountTokens(
            pb.CountTokensRequest(model="smollm2", inputs=inputs("hello there")), timeout=10
        )
        served += 1
    print(f"{served} other requests answered meanwhile")
    assert served > 10
    for task in hostile:
        error = task.result()
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "CHAT_TEMPLATE_FAILED")
    answer = await service.stub.RenderChat(
        pb.RenderChatRequest(model="smollm2", messages=MESSAGES), timeout=10
    )
    assert "Be brief." in answer.text


async def test_a_large_text_blocks_nobody(service: Service, oracle: Backend) -> None:
    rng = random.Random(11)
    words = ["the", "dog", "sang", "Grüße", "你好", "1234", "\n", "👍🏽", "uncharacteristically"]
    large = " ".join(rng.choice(words) for _ in range(150_000))[:1_000_000]
    request = pb.EncodeRequest(model="smollm2", inputs=inputs(large), return_offsets=True)
    call = service.stub.Encode(request, timeout=60)
    served = 0
    while not call.done():
        small = await service.stub.Encode(
            pb.EncodeRequest(model="smollm2", inputs=inputs("hello there")), timeout=10
        )
        assert list(small.encodings[0].ids) == oracle.encode("hello there").ids
        served += 1
    print(f"{served} small requests answered while {len(large.encode())} bytes were encoded")
    assert served > 20
    encoding = (await call).encodings[0]
    assert encoding.offsets[-1].end == len(large)
    assert oracle.decode(list(encoding.ids), skip_special_tokens=False) == large


async def test_a_registry_that_is_away(tmp_path: Path, smollm2_folder: Path) -> None:
    """Not ready before it was there once; later on what it said holds, and aliases move when it is back."""
    registry = HeldRegistry()
    first = registry.add("smollm2", smollm2_folder, number=1)
    async with running_registry(registry) as server:
        address = f"127.0.0.1:{server.port}"
    async with running_service(registry, address, tmp_path, smollm2_folder) as running:
        assert await readiness(running.channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        request = pb.CountTokensRequest(model="smollm2", inputs=inputs("hello"))
        error = await failure(running.stub.CountTokens(request, timeout=30))
        assert (error.code, error.reason) == ("UNAVAILABLE", "REGISTRY_UNAVAILABLE")
        assert error.retry_after_s
        async with running_registry(registry, address):
            await until_ready(running.channel)
            assert (await running.stub.CountTokens(request, timeout=10)).artifact_digest == first.digest
        await asyncio.sleep(1.1)
        asked = registry.num_asked
        for _ in range(3):
            assert (await running.stub.CountTokens(request, timeout=10)).artifact_digest == first.digest
        assert registry.num_asked == asked
        assert running.logged("the registry is away; what it said last is used")
        assert await readiness(running.channel) == health_pb2.HealthCheckResponse.SERVING
        second = registry.add("smollm2", smollm2_folder, number=2)
        async with running_registry(registry, address):
            for _ in range(100):
                if (await running.stub.CountTokens(request, timeout=10)).artifact_digest == second.digest:
                    break
                await asyncio.sleep(0.1)
            else:
                pytest.fail("the alias did not move")
        children = children_of(running.process.pid)
        assert len(children) >= 2
        running.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(running.process.wait, 15) == 0
        assert not any(is_there(child) for child in children)
        assert running.logged("stopping")
    assert "hello" not in running.log.read_text()

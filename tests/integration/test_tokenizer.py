"""The tokenizer as a process over gRPC, with the packaged model and a registry that the test holds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import Tokenizer as Backend

from treadle.api.registry.v1 import artifact_pb2, registry_pb2, registry_pb2_grpc
from treadle.api.tokenizer.v1 import tokenizer_pb2 as pb
from treadle.api.tokenizer.v1 import tokenizer_pb2_grpc
from treadle.errors import NotFound, TreadleError
from treadle.models.stored_folder import file_digest
from treadle.process import child_command
from treadle.rpc import RpcServer, from_rpc_error, open_channel

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXTS = [
    "Once upon a time,",
    "Grüße 👍🏽 你好 مرحبا — family: 👨‍👩‍👧‍👦",
    "<|im_start|>user\nhi<|im_end|>",
    "1234567890 3.14159\t\n\n    indented",
    "",
]
MESSAGES = [pb.Message(role="system", content="Be brief."), pb.Message(role="user", content="Hello 👍🏽")]
HOSTILE = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


class HeldRegistry(registry_pb2_grpc.RegistryServiceServicer):
    """Knows the artifacts that a test put in."""

    def __init__(self) -> None:
        self.artifacts: dict[str, artifact_pb2.Artifact] = {}
        self.num_asked = 0

    def add(self, alias: str, folder: Path, *, number: int) -> artifact_pb2.Artifact:
        """An artifact with digests of its own."""
        digest, tokenizer, presentation = (f"sha256:{kind}{number:063}" for kind in "abc")
        artifact = artifact_pb2.Artifact(
            digest=digest,
            tokenizer_digest=tokenizer,
            presentation_digest=presentation,
            location=str(folder),
            files=[
                artifact_pb2.ArtifactFile(path=path.name, digest=file_digest(path), bytes=path.stat().st_size)
                for path in folder.glob("*.j*")
            ],
        )
        self.artifacts[alias] = self.artifacts[digest] = artifact
        return artifact

    async def ResolveModel(self, request, context):
        self.num_asked += 1
        if request.model not in self.artifacts:
            raise NotFound(f"no model {request.model!r}", reason="MODEL_NOT_FOUND")
        return registry_pb2.ResolveModelResponse(artifact=self.artifacts[request.model])

    async def ListArtifacts(self, request, context):
        return registry_pb2.ListArtifactsResponse()


@dataclass
class Service:
    """A tokenizer process, its registry and a way to call it."""

    registry: HeldRegistry
    process: subprocess.Popen[bytes]
    log: Path
    address: str
    channel: grpc.aio.Channel
    folder: Path
    stub: Any = field(init=False)

    def __post_init__(self) -> None:
        self.stub = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)

    def logged(self, message: str) -> list[dict[str, Any]]:
        """The log's entries with this message."""
        entries = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [entry for entry in entries if entry["message"] == message]


@contextlib.asynccontextmanager
async def running_registry(registry: HeldRegistry, address: str = "127.0.0.1:0") -> AsyncIterator[RpcServer]:
    server = RpcServer(address)
    server.add(
        registry_pb2_grpc.add_RegistryServiceServicer_to_server,
        registry,
        "treadle.api.registry.v1.RegistryService",
    )
    async with server.running(grace_s=0.1):
        yield server


@contextlib.contextmanager
def started(registry_address: str, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and its address, once it listens."""
    environment = os.environ | {
        "TREADLE_TOKENIZER_ADDRESS": "127.0.0.1:0",
        "TREADLE_REGISTRY_ADDRESS": registry_address,
        "TREADLE_TOKENIZER_TEMPLATE_DEADLINE_S": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = child_command([sys.executable, "-m", "treadle_tokenizer"])
    with log.open("w") as output, subprocess.Popen(command, env=environment, stderr=output) as process:
        try:
            yield process, f"127.0.0.1:{listening_port(process, log)}"
        finally:
            process.kill()


def listening_port(process: subprocess.Popen[bytes], log: Path) -> int:
    for _ in range(600):
        for line in log.read_text().splitlines():
            if (entry := json.loads(line))["message"] == "listening":
                return int(entry["port"])
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    pytest.fail(f"the service did not listen: {log.read_text()}")


@contextlib.asynccontextmanager
async def running_service(
    registry: HeldRegistry, registry_address: str, home: Path, folder: Path
) -> AsyncIterator[Service]:
    log = home / "tokenizer.log"
    with started(registry_address, log) as (process, address):
        async with open_channel(address) as channel:
            yield Service(registry, process, log, address, channel, folder)


async def readiness(channel: grpc.aio.Channel) -> int:
    response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return int(response.status)


async def until_ready(channel: grpc.aio.Channel) -> None:
    for _ in range(600):
        if await readiness(channel) == health_pb2.HealthCheckResponse.SERVING:
            return
        await asyncio.sleep(0.05)
    pytest.fail("not ready within 30 s")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path) -> AsyncIterator[Service]:
    registry = HeldRegistry()
    registry.add("smollm2", smollm2_folder, number=1)
    async with (
        running_registry(registry) as server,
        running_service(
            registry, f"127.0.0.1:{server.port}", tmp_path_factory.mktemp("tokenizer"), smollm2_folder
        ) as running,
    ):
        await until_ready(running.channel)
        yield running


@pytest.fixture(scope="module")
def oracle(smollm2_folder: Path) -> Backend:
    return Backend.from_file(str(smollm2_folder / "tokenizer.json"))


def inputs(*texts: str) -> list[pb.EncodeInput]:
    return [pb.EncodeInput(text=text) for text in texts]


async def failure(call: Any) -> TreadleError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_one_load_for_all_who_come_at_once(service: Service) -> None:
    """First, so that nothing is loaded yet."""
    digest = service.registry.artifacts["smollm2"].digest
    requests = [pb.EncodeRequest(model=name, inputs=inputs("hi")) for name in ["smollm2", digest] * 16]
    answers = await asyncio.gather(*(service.stub.Encode(request, timeout=30) for request in requests))
    assert len({answer.SerializeToString() for answer in answers}) == 1
    assert answers[0].artifact_digest == digest
    assert answers[0].tokenizer_digest == service.registry.artifacts["smollm2"].tokenizer_digest
    assert len(service.logged("tokenizer loaded")) == 1
    print(f"{len(answers)} answers, {service.registry.num_asked} questions to the registry")
    assert 2 <= service.registry.num_asked < 16


async def test_encode_as_the_library(service: Service, oracle: Backend) -> None:
    request = pb.EncodeRequest(
        model="smollm2",
        inputs=inputs(*TEXTS),
        return_offsets=True,
        return_type_ids=True,
        return_attention_mask=True,
    )
    answer = await service.stub.Encode(request, timeout=10)
    assert len(answer.encodings) == len(TEXTS)
    for index, (encoding, text) in enumerate(zip(answer.encodings, TEXTS, strict=True)):
        expected = oracle.encode(text)
        assert list(encoding.ids) == expected.ids
        assert [(offset.start, offset.end) for offset in encoding.offsets] == expected.offsets
        assert list(encoding.type_ids) == expected.type_ids
        assert list(encoding.attention_mask) == [1] * len(expected.ids)
        assert encoding.input_index == index
    last = answer.encodings[1].offsets[-1]
    assert last.end == len(TEXTS[1]) < len(TEXTS[1].encode())


async def test_windows_and_padding(service: Service, oracle: Backend) -> None:
    ids = oracle.encode("the dog sang and " * 20).ids
    request = pb.EncodeRequest(
        model="smollm2",
        inputs=inputs("short", "the dog sang and " * 20),
        truncation=pb.Truncation(max_length=16, stride=4, return_overflowing=True),
    )
    answer = await service.stub.Encode(request, timeout=10)
    rows = [list(encoding.ids) for encoding in answer.encodings if encoding.input_index == 1]
    assert [row[0] for row in rows] == [ids[start] for start in range(0, len(ids) - 4, 12)]
    assert rows[0] + [token for row in rows[1:] for token in row[4:]] == ids
    left = pb.EncodeRequest(
        model="smollm2",
        inputs=inputs("the dog sang and " * 20),
        truncation=pb.Truncation(max_length=5, side=pb.TRUNCATION_SIDE_LEFT),
    )
    assert list((await service.stub.Encode(left, timeout=10)).encodings[0].ids) == ids[-5:]


async def test_decode_and_count(service: Service, oracle: Backend) -> None:
    rows = [oracle.encode(text).ids for text in TEXTS]
    rng = random.Random(5)
    rows.append([rng.randrange(oracle.get_vocab_size()) for _ in range(300)])
    for skip in (True, False):
        request = pb.DecodeRequest(
            model="smollm2", inputs=[pb.DecodeInput(ids=row) for row in rows], skip_special_tokens=skip
        )
        answer = await service.stub.Decode(request, timeout=10)
        assert list(answer.texts) == [oracle.decode(row, skip_special_tokens=skip) for row in rows]
    unset = await service.stub.Decode(
        pb.DecodeRequest(model="smollm2", inputs=[pb.DecodeInput(ids=rows[2])]), timeout=10
    )
    assert "<|im_start|>" not in unset.texts[0]
    count = await service.stub.CountTokens(
        pb.CountTokensRequest(model="smollm2", inputs=inputs(*TEXTS)), timeout=10
    )
    assert list(count.counts) == [len(row) for row in rows[:-1]]


async def test_render_chat(service: Service, oracle: Backend) -> None:
    request = pb.RenderChatRequest(model="smollm2", messages=MESSAGES, tokenize=True)
    answer = await service.stub.RenderChat(request, timeout=10)
    assert answer.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello 👍🏽<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert list(answer.ids) == oracle.encode(answer.text, add_special_tokens=False).ids
    start = oracle.token_to_id("<|im_start|>")
    assert list(answer.ids).count(start) == 3
    without = pb.RenderChatRequest(model="smollm2", messages=MESSAGES, add_generation_prompt=False)
    answer = await service.stub.RenderChat(without, timeout=10)
    assert answer.text.endswith("Hello 👍🏽<|im_end|>\n")
    assert not answer.ids


async def test_special_tokens_are_not_doubled(service: Service, tmp_path: Path) -> None:
    """A tokenizer that begins every text with a token, and a template that writes it."""
    backend = Backend.from_file(str(service.folder / "tokenizer.json"))
    from tokenizers import processors

    start = backend.token_to_id("<|im_start|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>"}')
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ mood }}")
    service.registry.add("beginner", tmp_path, number=2)
    request = pb.RenderChatRequest(
        model="beginner", messages=MESSAGES, template_arguments_json='{"mood": "!"}', tokenize=True
    )
    answer = await service.stub.RenderChat(request, timeout=10)
    assert answer.text == "<|im_start|>Be brief.!"
    assert list(answer.ids).count(start) == 1
    encoded = await service.stub.Encode(
        pb.EncodeRequest(model="beginner", inputs=inputs("Be brief.!")), timeout=10
    )
    assert list(encoded.encodings[0].ids) == list(answer.ids)


async def test_refusals_name_the_field(service: Service) -> None:
    stub, model = service.stub, "smollm2"
    cases = [
        (stub.Encode(pb.EncodeRequest(model="", inputs=inputs("a"))), "model"),
        (stub.Encode(pb.EncodeRequest(model=model)), "inputs"),
        (stub.Encode(pb.EncodeRequest(model=model, inputs=inputs("a") * 1025)), "inputs"),
        (stub.Encode(pb.EncodeRequest(model=model, inputs=inputs("a", "b" * (5 << 20)))), "inputs[1].text"),
        (
            stub.Encode(pb.EncodeRequest(model=model, inputs=inputs("a"), truncation=pb.Truncation())),
            "truncation.max_length",
        ),
        (
            stub.Encode(
                pb.EncodeRequest(
                    model=model, inputs=inputs("a"), truncation=pb.Truncation(max_length=4, stride=1)
                )
            ),
            "truncation.stride",
        ),
        (
            stub.Encode(
                pb.EncodeRequest(
                    model=model,
                    inputs=[pb.EncodeInput(text="a", pair="b")],
                    truncation=pb.Truncation(max_length=4, return_overflowing=True),
                )
            ),
            "inputs[0].pair",
        ),
        (
            stub.Decode(pb.DecodeRequest(model=model, inputs=[pb.DecodeInput(ids=[1, 49152])])),
            "inputs[0].ids[1]",
        ),
        (stub.RenderChat(pb.RenderChatRequest(model=model)), "messages"),
        (
            stub.RenderChat(
                pb.RenderChatRequest(model=model, messages=MESSAGES, template_arguments_json='{"tool": 1}')
            ),
            "template_arguments_json",
        ),
        (
            stub.RenderChat(
                pb.RenderChatRequest(model=model, messages=MESSAGES, template_arguments_json="[1]")
            ),
            "template_arguments_json",
        ),
    ]
    for call, expected in cases:
        error = await failure(call)
        assert error.code == "INVALID_ARGUMENT"
        assert [violation.field for violation in error.fields] == [expected]
    print(f"{len(cases)} refusals")


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


def children_of(process: int) -> list[int]:
    return [
        int(child)
        for thread in Path(f"/proc/{process}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]


def is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()

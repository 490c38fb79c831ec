"""Real gateways over a real Valkey, with a registry, a tokenizer and a worker that do as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from redis.asyncio import Redis

from treadle.api.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from treadle.api.registry.v1 import artifact_pb2, registry_pb2, registry_pb2_grpc
from treadle.api.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from treadle.api.worker.v1.queue_pb2 import (
    WORKER_STATE_READY,
    Heartbeat,
    LaneEntry,
    LoadedProfile,
    StreamEntry,
    TaskResult,
    Terminal,
)
from treadle.errors import NotFound, invalid_field
from treadle.queue import codec, dirty, lanes
from treadle.queue.connection import connect, connect_blocking
from treadle.queue.epochs import take
from treadle.queue.keys import RequestKeys
from treadle.queue.log import Append, Appended, EntryId, append
from treadle.queue.workers import beat, leave
from treadle.rpc import RpcServer, open_channel
from treadle_gateway.config import GatewayConfig
from treadle_gateway.gateway import Gateway, running_gateway

PROFILE, VOCAB, CONTEXT, EOS = "p-tiny", 300, 10_000, 2
DIGEST, COMPUTE, TOKENIZER = "sha256:artifact", "sha256:compute", "sha256:tokenizer"


class FakeRegistry(registry_pb2_grpc.RegistryServiceServicer):
    """Knows "tiny", "asleep", which nobody serves, and what a test adds."""

    def __init__(self) -> None:
        self.calls = 0
        self.others: dict[str, artifact_pb2.Artifact] = {}

    async def ResolveModel(self, request, context):
        self.calls += 1
        if request.model in self.others:
            return registry_pb2.ResolveModelResponse(artifact=self.others[request.model])
        if request.model not in ("tiny", "asleep", DIGEST):
            raise NotFound(f"no {request.model}")
        asleep = request.model == "asleep"
        return registry_pb2.ResolveModelResponse(
            artifact=artifact_pb2.Artifact(
                digest="sha256:asleep" if asleep else DIGEST,
                compute_digest="sha256:other" if asleep else COMPUTE,
                tokenizer_digest=TOKENIZER,
                facts={"vocab_size": VOCAB, "context_length": CONTEXT},
                generation_defaults={"temperature": 0.75, "top_k": 5, "eos_token_ids": [EOS]},
            )
        )

    async def ListAliases(self, request, context):
        aliases = [{"name": "tiny", "artifact_digest": DIGEST}]
        aliases += [
            {"name": name, "artifact_digest": one.digest}
            for name, one in self.others.items()
            if name != one.digest
        ]
        return registry_pb2.ListAliasesResponse(aliases=aliases)


class FakeTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """One id a byte, from 4 on; a chat is its contents, one after the other. An encoder's text stands between
    1 and 3, and so does a pair's second one."""

    def __init__(self) -> None:
        self.calls = 0

    async def Encode(self, request, context):
        self.calls += 1
        for number, one in enumerate(request.inputs):
            for field in ("text", "pair"):
                if "bad text" in getattr(one, field):
                    raise invalid_field(f"inputs[{number}].{field}", "is bad")
        special = request.add_special_tokens and request.model not in ("sha256:artifact", "sha256:asleep")
        return tokenizer_pb2.EncodeResponse(
            artifact_digest=request.model,
            tokenizer_digest=TOKENIZER,
            encodings=[encoding(request, one, special) for one in request.inputs],
        )

    async def RenderChat(self, request, context):
        if any(message.role == "villain" for message in request.messages):
            raise invalid_field("messages[1].role", "is not known to the template")
        if "slow" in request.template_arguments_json:
            await asyncio.sleep(30)
        text = "".join(message.content for message in request.messages)
        return tokenizer_pb2.RenderChatResponse(
            artifact_digest=request.model,
            tokenizer_digest=TOKENIZER,
            text=text,
            ids=[byte + 4 for byte in text.encode()],
        )


def encoding(request, asked, special: bool) -> tokenizer_pb2.Encoding:
    """A text or pair as ids, with all that can be asked for."""
    first, second = ([byte + 4 for byte in text.encode()] for text in (asked.text, asked.pair))
    if request.HasField("truncation"):
        most = request.truncation.max_length - (2 + asked.HasField("pair") if special else 0)
        if request.truncation.strategy == tokenizer_pb2.TRUNCATION_STRATEGY_ONLY_SECOND:
            second = second[: max(0, most - len(first))]
        else:
            first = first[:most]
    if not special:
        mask = [0] * len(first) if request.return_special_tokens_mask else []
        return tokenizer_pb2.Encoding(ids=first, special_tokens_mask=mask)
    ids = [1, *first, 3] + ([*second, 3] if asked.HasField("pair") else [])
    found = tokenizer_pb2.Encoding(ids=ids)
    if request.return_type_ids:
        found.type_ids.extend([0] * (len(first) + 2) + [1] * (len(ids) - len(first) - 2))
    if request.return_special_tokens_mask:
        found.special_tokens_mask.extend(int(one < 4) for one in ids)
    if request.return_offsets:
        words = [asked.text[:at].count(" ") for at in range(len(first))]
        found.word_ids.extend([-1, *words, -1])
        found.offsets.extend(
            tokenizer_pb2.Offset(start=max(0, at - 1), end=at if one >= 4 else max(0, at - 1))
            for at, one in enumerate(ids)
        )
    return found


class ScriptedWorker:
    """Takes from the lanes and writes made-up tokens, as many as asked for; a held request one a permit.

    Of a task it writes what the test gave it, or bytes of the size that was asked for.
    """

    def __init__(self, redis: Redis, blocking: Redis) -> None:
        self.redis = redis
        self.taken: list[LaneEntry] = []
        self.fenced: list[str] = []
        self.found_ended: list[str] = []
        self.finished: list[str] = []
        self.padding = ""
        """Added to each token's text, to make entries large."""
        self.consumer = "worker-1"
        self.profiles = [PROFILE]
        self.task_ends: dict[str, Terminal] = {}
        """By request, instead of a result."""
        self.stopping = False
        self._blocking = blocking
        self._permits: dict[str, asyncio.Semaphore] = {}

    def hold(self, request_id: str, permits: int = 0) -> asyncio.Semaphore:
        """Makes a request wait for a permit before each token."""
        return self._permits.setdefault(request_id, asyncio.Semaphore(permits))

    def heartbeat(self, **fields) -> Heartbeat:
        loaded = {
            "profile": PROFILE,
            "artifact_digest": DIGEST,
            "compute_digest": COMPUTE,
            "tokenizer_digest": TOKENIZER,
            "model_name": "tiny",
            "max_model_len": CONTEXT,
            "vocab_size": VOCAB,
            "state": WORKER_STATE_READY,
        } | fields
        return Heartbeat(consumer=self.consumer, state=WORKER_STATE_READY, profiles=[LoadedProfile(**loaded)])

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while not self.stopping:
                found = [lane for profile in self.profiles for lane in await lanes.find(self.redis, profile)]
                if not found:
                    await asyncio.sleep(0.01)
                    continue
                for delivery in await lanes.await_new(self._blocking, found, self.consumer, block_ms=200):
                    entry = codec.decode(LaneEntry, delivery.data)
                    self.taken.append(entry)
                    group.create_task(self._answer(delivery, entry))
            # The cancellation itself may have been swallowed (see Deadline.bound).
            raise asyncio.CancelledError

    async def _answer(self, delivery: lanes.Delivery, entry: LaneEntry) -> None:
        request = RequestKeys(entry.tenant, entry.request_id)
        (taken,) = await take(self.redis, [request], self.consumer)
        if taken is not None and taken.terminal is None:
            await self._write(request, entry, taken.epoch)
        else:
            self.found_ended.append(entry.request_id)
        pipe = self.redis.pipeline(transaction=False)
        lanes.finish(pipe, delivery.lane, delivery.entry_id)
        await pipe.execute()

    async def _write(self, request: RequestKeys, entry: LaneEntry, epoch: int) -> None:
        is_task = entry.HasField("task")
        if is_task:
            end = self.task_ends.get(entry.request_id) or Terminal(task_result=task_result(entry))
            messages = [StreamEntry(terminal=end)]
        else:
            messages = answer(entry, self.padding)
        for number, message in enumerate(messages, 1):
            if (is_task or message.HasField("tokens")) and entry.request_id in self._permits:
                await self._permits[entry.request_id].acquire()
            outcome = await self.append(request, EntryId(epoch, number), message)
            if outcome is not Appended.WRITTEN:
                self.fenced.append(entry.request_id)
                return
        self.finished.append(entry.request_id)

    async def append(self, request: RequestKeys, id_: EntryId, message: StreamEntry) -> Appended:
        watchers = [name.decode() for name in await self.redis.smembers(request.watchers)]
        news = {watcher: [dirty.unread(request)] for watcher in watchers}
        (outcome,) = await append(
            self.redis, [Append(request, id_, codec.encode(message))], lambda pipe: dirty.push(pipe, news)
        )
        return outcome


def task_result(entry: LaneEntry) -> TaskResult:
    """What the scripted worker makes of a task: of input n, n and what follows it."""
    task, rows = entry.task, []
    for number, one in enumerate(task.inputs):
        match task.WhichOneof("task"):
            case "embed":
                width = task.embed.dimensions or 4
                rows.append(struct.pack(f"<{width}f", *(number + at for at in range(width))))
            case "classify":
                rows.append(struct.pack("<3f", 0.25, 0.5, 0.25))
            case "rank" if task.rank.HasField("embed") and number == 0:
                continue
            case "rank":
                rows.append(struct.pack("<f", number))
            case "tag":
                rows.append(struct.pack("<If", 1, 0.5) * len(one.token_ids))
            case "score":
                rows += [struct.pack("<If", token, -0.5) for token in one.token_ids[one.first :]]
    data = b"".join(rows)
    return TaskResult(data=data, artifact_digest=entry.artifact_digest, profile=entry.profile)


def answer(entry: LaneEntry, padding: str) -> list[StreamEntry]:
    """What the scripted worker writes."""
    count, length = entry.stopping.max_new_tokens, len(entry.prompt_token_ids)
    tokens = [
        StreamEntry(
            tokens=generation_pb2.TokenDelta(
                index=index,
                token_ids=[3 + (index * 7 + length) % (VOCAB - 3)],
                text=f"{index} {padding}",
            )
        )
        for index in range(count)
    ]
    started = generation_pb2.Started(
        request_id=entry.request_id,
        artifact_digest=entry.artifact_digest,
        profile=entry.profile,
        prompt_tokens=length,
        seed=entry.sampling.seed,
        tokenizer_digest=entry.tokenizer_digest,
    )
    finished = generation_pb2.Finished(
        choices=[{"finish_reason": generation_pb2.FINISH_REASON_LENGTH}],
        usage={"prompt_tokens": length, "output_tokens": count},
    )
    return [StreamEntry(started=started), *tokens, StreamEntry(terminal=Terminal(finished=finished))]


@contextlib.asynccontextmanager
async def serving(add, servicer, service: str) -> AsyncIterator[RpcServer]:
    server = RpcServer("127.0.0.1:0")
    server.add(add, servicer, service)
    async with server.running(0):
        await server.set_ready(True)
        yield server


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def fake_registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
async def registry_server(fake_registry: FakeRegistry) -> AsyncIterator[RpcServer]:
    add = registry_pb2_grpc.add_RegistryServiceServicer_to_server
    async with serving(add, fake_registry, "treadle.api.registry.v1.RegistryService") as server:
        yield server


@pytest.fixture
async def fake_tokenizer() -> FakeTokenizer:
    return FakeTokenizer()


@pytest.fixture
async def tokenizer_server(fake_tokenizer: FakeTokenizer) -> AsyncIterator[RpcServer]:
    add = tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server
    async with serving(add, fake_tokenizer, "treadle.api.tokenizer.v1.TokenizerService") as server:
        yield server


@pytest.fixture
async def worker(redis: Redis, redis_url: str) -> AsyncIterator[ScriptedWorker]:
    blocking = connect_blocking(redis_url, block_s=1)
    worker = ScriptedWorker(redis, blocking)
    await beat(redis, worker.heartbeat())
    task = asyncio.create_task(worker.run())
    yield worker
    worker.stopping = True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await leave(redis, worker.consumer)
    await blocking.aclose()


@pytest.fixture
async def start_gateway(
    redis_url: str, registry_server: RpcServer, tokenizer_server: RpcServer
) -> AsyncIterator[Callable]:
    """Starts gateways with settings of the test's; `stop` ends one before the test does."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**settings) -> Gateway:
            config = GatewayConfig(
                **{
                    "address": "127.0.0.1:0",
                    "registry_address": f"127.0.0.1:{registry_server.port}",
                    "tokenizer_address": f"127.0.0.1:{tokenizer_server.port}",
                    "redis_url": redis_url,
                    "grace_period_s": 0.5,
                }
                | settings
            )
            return await stack.enter_async_context(running_gateway(config))

        yield start


@pytest.fixture
async def gateway(start_gateway) -> Gateway:
    return await start_gateway()


@pytest.fixture
async def connect_to() -> AsyncIterator[Callable]:
    """A client's stub of a gateway, over a channel of its own."""
    async with contextlib.AsyncExitStack() as stack:

        async def connect_to(gateway: Gateway) -> inference_pb2_grpc.InferenceServiceStub:
            channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{gateway.server.port}"))
            # Channels of a process share connections by address, and a port may have been another test's.
            await channel.channel_ready()
            return inference_pb2_grpc.InferenceServiceStub(channel)

        yield connect_to


@pytest.fixture
async def stub(gateway: Gateway, connect_to) -> inference_pb2_grpc.InferenceServiceStub:
    return await connect_to(gateway)


@pytest.fixture
def generation() -> Callable[..., generation_pb2.Generation]:
    def make(request_id: str = "", count: int = 5, **fields) -> generation_pb2.Generation:
        stopping = {"max_new_tokens": count} | fields.pop("stopping", {})
        prompt = {} if {"token_ids", "chat"} & fields.keys() else {"text": "Hello"}
        defaults = {"model": "tiny", "stopping": stopping, "request_id": request_id} | prompt
        return generation_pb2.Generation(**(defaults | fields))

    return make


@pytest.fixture
def stream() -> Callable:
    """Opens GenerateStream."""

    def open_stream(stub, asked: generation_pb2.Generation, timeout: float = 20):
        return stub.GenerateStream(inference_pb2.GenerateStreamRequest(generation=asked), timeout=timeout)

    return open_stream


@pytest.fixture
def read() -> Callable:
    """The chunks of a call, up to its end or so many."""

    async def read_chunks(call, count: int | None = None) -> list[generation_pb2.GenerateChunk]:
        chunks: list[generation_pb2.GenerateChunk] = []
        while count is None or len(chunks) < count:
            response = await call.read()
            if response is grpc.aio.EOF:
                assert count is None, f"the stream ended after {len(chunks)} chunks"
                break
            chunks.append(response.chunk)
        return chunks

    return read_chunks


@pytest.fixture
def eventually() -> Callable:
    """Waits until a condition holds."""

    async def wait(condition, what: str, limit_s: float = 10) -> None:
        async with asyncio.timeout(limit_s) as scope:
            while True:
                value = condition()
                if value is True or (not isinstance(value, bool) and await value):
                    return
                await asyncio.sleep(0.01)
        assert not scope.expired(), what

    return wait

"""A worker is killed, or stopped past its lease, with tasks in its hands: each is answered, and the same."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
from encoder_folders import write_encoder
from queue_view import QueueView
from service_stack import ServiceStack, service_stack
from waiting import until

from treadle.api.inference.v1 import inference_pb2 as pb
from treadle.api.inference.v1 import inference_pb2_grpc
from treadle.queue.connection import connect
from treadle.queue.keys import RequestKeys
from treadle.rpc import open_channel

LEASE_S = 3.0
SETTINGS = {
    "TREADLE_WORKER_LEASE_S": f"{LEASE_S:g}",
    "TREADLE_WORKER_GRACE_PERIOD_S": "20",
    "TREADLE_GATEWAY_ATTACHED_S": f"{LEASE_S:g}",
}
WORDS = "king queen night sword heart good my thy sweet fair love death time away come never still".split()
CROWD, TEXTS = 64, 24


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceStack]:
    """Two workers with an encoder that takes its time."""
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6}
    write = partial(write_encoder, kind="bert", head="Model", **sizes)
    counts = {"registry": 1, "tokenizer": 1, "gateway": 1, "worker": 2}
    folder: Path = tmp_path_factory.mktemp("tasks")
    with service_stack(folder, counts, SETTINGS, write_model=write) as stack:
        yield stack


@pytest.fixture
async def stub(running: ServiceStack) -> AsyncIterator[inference_pb2_grpc.InferenceServiceAsyncStub]:
    running.restore()
    async with open_channel(running["gateway-1"].address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
async def queue(running: ServiceStack) -> AsyncIterator[QueueView]:
    client = connect(running.redis_url)
    yield QueueView(client)
    await client.aclose()


def crowd(model: str, name: str, rng: random.Random) -> list[pb.EmbedRequest]:
    """Requests of texts of mixed length."""
    return [
        pb.EmbedRequest(
            context={"model": model, "request_id": f"{name}-{number}"},
            inputs=[{"text": " ".join(rng.choices(WORDS, k=rng.randint(2, 70)))} for _ in range(TEXTS)],
        )
        for number in range(CROWD)
    ]


def renamed(asked: list[pb.EmbedRequest], name: str) -> list[pb.EmbedRequest]:
    """The same texts under other ids."""
    copies = []
    for number, one in enumerate(asked):
        copy = pb.EmbedRequest()
        copy.CopyFrom(one)
        copy.context.request_id = f"{name}-{number}"
        copies.append(copy)
    return copies


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_tasks_outlive_their_worker(running, stub, queue, rng, fate):
    name = fate.name.lower()
    undisturbed = crowd(running.model, f"{name}-calm", rng)
    expected = await asyncio.gather(*(stub.Embed(one, timeout=120) for one in undisturbed))
    asked = renamed(undisturbed, name)
    keys = [RequestKeys("default", one.context.request_id) for one in asked]
    calls = [asyncio.ensure_future(_embed(stub, one)) for one in asked]
    victim = rng.choice(running.of("worker"))

    async def holds_some() -> bool:
        return victim.name in (await queue.owned(keys)).values()

    await until(holds_some, f"{victim.name} holds tasks")
    victim.signal(fate)
    held = [key for key, owner in (await queue.owned(keys)).items() if owner == victim.name]
    answers = await asyncio.gather(*calls)
    if fate is signal.SIGSTOP:
        victim.signal(signal.SIGCONT)
    assert [one.embeddings.data for one in answers] == [one.embeddings.data for one in expected]
    fences = [await queue.fences(key) for key in held]
    assert held, "it had nothing to lose"
    assert all(len(taken) >= 2 for taken in fences)
    for key in keys:
        assert sum(entry.HasField("terminal") for _, entry in await queue.log(key)) == 1
    running.restore()
    await queue.until_empty()
    print(f"{name}: {len(held)} of {CROWD} tasks were its own and went to the other; every answer the same")


async def _embed(stub, asked: pb.EmbedRequest) -> pb.EmbedResponse:
    return await stub.Embed(asked, timeout=120)


async def test_a_client_that_leaves_frees_the_worker(running, stub, queue, rng):
    asked = crowd(running.model, "left", rng)
    keys = [RequestKeys("default", one.context.request_id) for one in asked]
    calls = [stub.Embed(one, timeout=120) for one in asked]

    async def some_are_owned() -> bool:
        return len(await queue.owned(keys)) >= 2

    await until(some_are_owned, "workers hold tasks")
    cancelled = sum(call.cancel() for call in calls)
    took = await queue.until_empty()
    ended = [entry for key in keys for _, entry in await queue.log(key) if entry.HasField("terminal")]
    failed = [entry for entry in ended if entry.terminal.HasField("error")]
    print(f"{cancelled} calls cancelled, {len(failed)} tasks ended by it; all lanes empty after {took:.1f} s")
    assert failed
    assert {entry.terminal.error.code for entry in failed} == {grpc.StatusCode.CANCELLED.value[0]}

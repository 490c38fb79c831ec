"""One stack of real processes for all of these tests; each test starts again what it, or another, killed."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from queue_view import QueueView
from redis.asyncio import Redis
from service_stack import ServiceStack, service_stack

from treadle.api.inference.v1 import generation_pb2, inference_pb2_grpc
from treadle.queue.connection import connect
from treadle.rpc import open_channel

LEASE_S = 3.0
"""Of workers, and of a gateway's word for its clients: the default of 15 s has a test of its own."""
LANE_LIMIT = 100
SETTINGS = {
    "TREADLE_WORKER_LEASE_S": f"{LEASE_S:g}",
    "TREADLE_WORKER_GRACE_PERIOD_S": "20",
    "TREADLE_GATEWAY_ATTACHED_S": f"{LEASE_S:g}",
    "TREADLE_GATEWAY_GRACE_PERIOD_S": "6",
    "TREADLE_GATEWAY_LANE_LIMIT": str(LANE_LIMIT),
    # Answers in many chunks, to cut between any two.
    "TREADLE_WORKER_GATHER_S": "0",
    # Small steps: a long prompt takes many of them.
    "TREADLE_ENGINE_MAX_NUM_BATCHED_TOKENS": "64",
}


@pytest.fixture(scope="package")
def running_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceStack]:
    """Two of what there can be two of."""
    counts = {"registry": 1, "tokenizer": 2, "trainer": 1, "gateway": 2, "worker": 2}
    with service_stack(tmp_path_factory.mktemp("stack"), counts, SETTINGS) as stack:
        yield stack


@pytest.fixture
def stack(running_stack: ServiceStack) -> ServiceStack:
    """The stack, whole again."""
    running_stack.restore()
    return running_stack


@pytest.fixture
async def gateways(stack: ServiceStack) -> AsyncIterator[list[inference_pb2_grpc.InferenceServiceAsyncStub]]:
    """A client of each gateway."""
    channels = [open_channel(service.address) for service in stack.of("gateway")]
    yield [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
    for channel in channels:
        await channel.close()


@pytest.fixture
async def redis(running_stack: ServiceStack) -> AsyncIterator[Redis]:
    client = connect(running_stack.redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def queue(redis: Redis) -> QueueView:
    return QueueView(redis)


@pytest.fixture
def ask(running_stack: ServiceStack) -> Callable[..., generation_pb2.Generation]:
    """Makes requests: greedy unless asked otherwise, and never ended by an end of text."""

    def generation(
        prompt: str | list[int], max_new_tokens: int, request_id: str = "", **fields
    ) -> generation_pb2.Generation:
        given = {"text": prompt} if isinstance(prompt, str) else {"token_ids": {"ids": prompt}}
        stopping = {"max_new_tokens": max_new_tokens, "ignore_eos": True} | fields.pop("stopping", {})
        sampling = {"temperature": 0.0} | fields.pop("sampling", {})
        return generation_pb2.Generation(
            model=running_stack.model,
            request_id=request_id,
            stopping=stopping,
            sampling=sampling,
            **given,
            **fields,
        )

    return generation


@pytest.fixture(autouse=True)
def quiet_grpc() -> None:
    """Channels to the dead complain."""
    logging.getLogger("grpc").setLevel(logging.CRITICAL)

"""A client of an empty Valkey, and entries to put into it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from redis.asyncio import Redis

from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.queue.connection import connect, connect_blocking


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def blocking(redis_url: str) -> AsyncIterator[Redis]:
    client = connect_blocking(redis_url, block_s=5)
    yield client
    await client.aclose()


@pytest.fixture
def lane_entry() -> Callable[..., LaneEntry]:
    def make(request_id: str = "r1", **fields) -> LaneEntry:
        defaults = {
            "tenant": "default",
            "profile": "p-1",
            "gateway_id": "g1",
            "payload_digest": "d1",
            "prompt_token_ids": [1, 2, 3],
        }
        return LaneEntry(request_id=request_id, **(defaults | fields))

    return make

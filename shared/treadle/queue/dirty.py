"""How a gateway learns which of its requests have news: one list a gateway, popped by it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from treadle.queue import keys
from treadle.queue.connection import redis_errors
from treadle.queue.keys import RequestKeys

_POP_LIMIT = 1024


def push(pipe: Pipeline, news: Mapping[str, Sequence[str]]) -> None:
    """Adds to a pipeline what tells each gateway of the requests, by tag, that have news."""
    for gateway_id, tags in news.items():
        key = keys.dirty(gateway_id)
        pipe.rpush(key, *tags)
        pipe.ltrim(key, -keys.DIRTY_LIMIT, -1)
        pipe.pexpire(key, keys.DIRTY_MS)


@redis_errors
async def pop(redis: Redis, gateway_id: str, *, block_s: float) -> list[RequestKeys]:
    """The requests that have news, each once; waits up to `block_s` for the first.

    `redis` is a client for blocking reads. What Redis lost is not announced again: read every waiting
    request's log now and then.
    """
    key = keys.dirty(gateway_id)
    first: Any = await redis.blpop([key], timeout=block_s)
    if first is None:
        return []
    more: Any = await redis.lpop(key, _POP_LIMIT)
    return [RequestKeys.from_tag(tag) for tag in dict.fromkeys([first[1], *(more or ())])]

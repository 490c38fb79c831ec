"""How a gateway learns which of its requests have news: one list a gateway, popped by it alone.

An item names a request, and carries what was written to its log where that is small: a gateway that has all
before it need not read. The log is the truth: whoever misses an item, or gets one twice, loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from treadle.api.worker.v1 import queue_pb2
from treadle.errors import TreadleError
from treadle.queue import codec, keys
from treadle.queue.connection import redis_errors
from treadle.queue.keys import RequestKeys
from treadle.queue.log import START, EntryId, LogEntry

INLINE_BYTES = 2048
"""A longer entry is not carried along: its news say to read the log."""
_POP_LIMIT = 1024


@dataclass(frozen=True, slots=True)
class News:
    """A request's log has grown."""

    request: RequestKeys
    entry: LogEntry | None = None
    """What was written; None: read the log."""
    previous: EntryId = START
    """Nothing but fences lies between this and the entry."""


def written(request: RequestKeys, id_: EntryId, data: bytes, previous: EntryId) -> bytes:
    """The item for an entry, once it is in the log: never before, for it may be refused."""
    if len(data) > INLINE_BYTES:
        return unread(request)
    news = queue_pb2.News(
        tenant=request.tenant,
        request_id=request.request_id,
        entry=data,
        epoch=id_.epoch,
        number=id_.number,
        previous_epoch=previous.epoch,
        previous_number=previous.number,
    )
    return codec.encode(news)


def unread(request: RequestKeys) -> bytes:
    """The item that says to read the log."""
    return codec.encode(queue_pb2.News(tenant=request.tenant, request_id=request.request_id))


def push(pipe: Pipeline, news: Mapping[str, Sequence[bytes]]) -> None:
    """Adds to a pipeline what tells each gateway its items."""
    for gateway_id, items in news.items():
        key = keys.dirty(gateway_id)
        pipe.rpush(key, *items)
        pipe.ltrim(key, -keys.DIRTY_LIMIT, -1)
        pipe.pexpire(key, keys.DIRTY_MS)


@redis_errors
async def pop(redis: Redis, gateway_id: str, *, block_s: float) -> list[News]:
    """The news in their order; waits up to `block_s` for the first.

    `redis` is a client for blocking reads. What Redis lost is not announced again: read every waiting
    request's log now and then.
    """
    key = keys.dirty(gateway_id)
    reply: Any = await redis.blmpop(block_s, 1, key, direction="LEFT", count=_POP_LIMIT)
    return [news for item in reply[1] if (news := _decoded(item)) is not None] if reply else []


def _decoded(item: bytes) -> News | None:
    """The news of an item; where a later worker wrote what we cannot read, without the entry, or none."""
    try:
        news = codec.decode(queue_pb2.News, item)
    except TreadleError:
        return None
    request = RequestKeys(news.tenant, news.request_id)
    if not news.entry:
        return News(request)
    try:
        entry = codec.decode(queue_pb2.StreamEntry, news.entry)
    except TreadleError:
        return News(request)
    previous = EntryId(news.previous_epoch, news.previous_number)
    return News(request, LogEntry(EntryId(news.epoch, news.number), entry), previous)

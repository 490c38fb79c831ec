"""What Redis knows of a request before anything is done for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from treadle.errors import AlreadyExists, NotFound
from treadle.queue.connection import redis_errors
from treadle.queue.keys import RequestKeys
from treadle.queue.log import START, EntryId, log_entries


@redis_errors
async def is_queued(redis: Redis, request: RequestKeys, payload_digest: str) -> bool:
    """Whether a request with this id and payload has been put into its lane.

    Raises AlreadyExists when the id is taken by another payload.
    """
    found: Any = await redis.hmget(request.reservation, ["payload", "entry"])
    payload, entry = found
    if payload is not None and payload.decode() != payload_digest:
        raise AlreadyExists(
            f"request_id {request.request_id!r} is taken by a request with another payload; "
            "choose another id",
            reason="REQUEST_ID_TAKEN",
        )
    return entry is not None


@dataclass(frozen=True, slots=True)
class LogState:
    """Where a request's log stands."""

    top: EntryId
    """The last entry."""
    ended_at: bool
    """Whether the entry that was asked for is the request's end."""


@redis_errors
async def log_state(redis: Redis, request: RequestKeys, at: EntryId = START) -> LogState:
    """The state of a log, and of its entry `at`; raises NotFound (REQUEST_NOT_FOUND) where there is none."""
    pipe = redis.pipeline(transaction=False)
    pipe.xrevrange(request.log, "+", "-", count=1)
    pipe.xrange(request.log, str(at), str(at))
    last, there = await pipe.execute()
    if not last:
        raise NotFound(
            f"no request {request.request_id!r} is known; it ended too long ago or never was",
            reason="REQUEST_NOT_FOUND",
        )
    ended = any(entry.entry.HasField("terminal") for entry in log_entries(there))
    return LogState(EntryId.parse(last[0][0]), ended)


@redis_errors
async def other_watchers(redis: Redis, request: RequestKeys, gateway_id: str) -> bool:
    """Whether other gateways have, or had, clients of the request."""
    watchers: Any = await redis.smembers(request.watchers)
    return any(name.decode() != gateway_id for name in watchers)

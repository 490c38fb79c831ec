"""The gateway's way into the queue: one request_id, one run.

The order of the writes is such that a gateway may die between any two: the reservation says that the id is
taken and by which payload, `enqueuing` that somebody is at it now, `entry` that it is in its lane. A retry
that finds a reservation without an entry and nobody at it writes the rest again. A request that is twice in
its lane is harmless: whoever finds a living owner, or the end, deletes the second entry.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from treadle.api.inference.v1.generation_pb2 import DISCONNECT_MODE_DETACH, Priority
from treadle.api.worker.v1.queue_pb2 import LaneEntry, Queued, StreamEntry
from treadle.errors import AlreadyExists, ResourceExhausted
from treadle.queue import codec, keys
from treadle.queue.connection import redis_errors
from treadle.queue.keys import RequestKeys
from treadle.queue.log import QUEUED, is_refused_id

_POLL_S = 0.05

_PRIORITY_NAMES = {
    Priority.PRIORITY_UNSPECIFIED: "normal",
    Priority.PRIORITY_LOW: "low",
    Priority.PRIORITY_NORMAL: "normal",
    Priority.PRIORITY_HIGH: "high",
}


def lane_of(entry: LaneEntry) -> str:
    """The lane that the entry belongs to."""
    return keys.lane(entry.profile, _PRIORITY_NAMES[entry.priority], entry.tenant)


@redis_errors
async def submit(
    redis: Redis, entry: LaneEntry, *, lane_limit: int, attached_ms: int = keys.ATTACHED_MS
) -> bool:
    """Puts a request into its lane, once however often it is called; True when this call did.

    `entry` names tenant, request_id, profile, priority, gateway_id and payload_digest, and everything that
    a worker needs. The caller then reads the log; with False it also calls `watch`, for the log may be
    another gateway's.

    Raises AlreadyExists when the id is taken by another payload, ResourceExhausted (LANE_FULL) when the
    lane holds `lane_limit` requests, waiting and running, and Unavailable.
    """
    request = RequestKeys(entry.tenant, entry.request_id)
    while True:
        queued, taken, length = await _reserve(redis, request, entry)
        if queued:
            return False
        if taken:
            break
        # Another call with this id is at it; should it die, its mark lapses and this one goes on.
        await asyncio.sleep(_POLL_S)
    if length >= lane_limit:
        await redis.delete(request.reservation, request.enqueuing)
        raise ResourceExhausted(
            f"the lane holds {length} requests and takes no more; try again later",
            reason="LANE_FULL",
            retry_after_s=1.0,
        )
    await _enqueue(redis, request, entry, attached_ms)
    return True


async def _reserve(redis: Redis, request: RequestKeys, entry: LaneEntry) -> tuple[bool, bool, int]:
    """Whether the request is in its lane, whether this call is the one to put it there, the lane's length."""
    pipe = redis.pipeline(transaction=False)
    pipe.hsetnx(request.reservation, "payload", entry.payload_digest)
    pipe.pexpire(request.reservation, keys.ACTIVE_MS, nx=True)
    pipe.set(request.enqueuing, entry.gateway_id, nx=True, px=keys.ENQUEUING_MS)
    # Read after the mark was tried: whoever deletes the mark has set the entry before.
    pipe.hmget(request.reservation, ["payload", "entry"])
    pipe.xlen(lane_of(entry))
    replies: list[Any] = await pipe.execute()
    _, _, marked, (payload, queued), length = replies
    if payload is not None and payload.decode() != entry.payload_digest:
        if marked:
            await redis.delete(request.enqueuing)
        raise AlreadyExists(
            f"request_id {entry.request_id!r} is taken by a request with another payload; choose another id",
            reason="REQUEST_ID_TAKEN",
        )
    if queued is not None:
        if marked:
            await redis.delete(request.enqueuing)
        return True, False, length
    return False, bool(marked), length


async def _enqueue(redis: Redis, request: RequestKeys, entry: LaneEntry, attached_ms: int) -> None:
    lane = lane_of(entry)
    pipe = redis.pipeline(transaction=False)
    queued = StreamEntry(queued=Queued(gateway_id=entry.gateway_id))
    pipe.xadd(request.log, codec.fields(queued), id=str(QUEUED))
    pipe.pexpire(request.log, keys.ACTIVE_MS)
    pipe.sadd(request.watchers, entry.gateway_id)
    pipe.pexpire(request.watchers, keys.ACTIVE_MS)
    if entry.disconnect_mode != DISCONNECT_MODE_DETACH:
        pipe.set(request.attached, entry.gateway_id, px=attached_ms)
    pipe.xgroup_create(lane, keys.GROUP, id="0", mkstream=True)
    pipe.sadd(keys.lanes(entry.profile), lane)
    pipe.xadd(lane, codec.fields(entry))
    replies: list[Any] = await pipe.execute(raise_on_error=False)
    for reply in replies:
        if isinstance(reply, Exception) and not _expected(reply):
            raise reply
    pipe = redis.pipeline(transaction=False)
    pipe.hset(request.reservation, mapping={"lane": lane, "entry": replies[-1]})
    pipe.pexpire(request.reservation, keys.ACTIVE_MS)
    pipe.delete(request.enqueuing)
    await pipe.execute()


def _expected(reply: Exception) -> bool:
    """A group, or a log, that was there before."""
    return is_refused_id(reply) or (isinstance(reply, ResponseError) and "BUSYGROUP" in str(reply))


@redis_errors
async def renew_attached(
    redis: Redis, gateway_id: str, requests: list[RequestKeys], *, attached_ms: int = keys.ATTACHED_MS
) -> None:
    """Says that the clients of these requests are still there, RENEWALS times in `attached_ms`.

    Where nobody says so for as long the worker ends the request, unless it asked for DETACH.
    """
    if not requests:
        return
    pipe = redis.pipeline(transaction=False)
    for request in requests:
        pipe.set(request.attached, gateway_id, px=attached_ms)
    await pipe.execute()

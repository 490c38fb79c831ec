"""News that travel beside a request: cancel it, watch it; and the workers' streams that carry them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.rpc.status_pb2 import Status
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from treadle.api.worker.v1.queue_pb2 import CancelNotice, ControlEntry, StreamEntry, Terminal, WatchNotice
from treadle.errors import NotFound
from treadle.queue import codec, dirty, keys, lanes
from treadle.queue.connection import redis_errors
from treadle.queue.epochs import take
from treadle.queue.keys import RequestKeys
from treadle.queue.log import Append, Appended, EntryId, append


async def cancel(
    redis: Redis, request: RequestKeys, status: Status, *, retention_ms: int = keys.RETENTION_MS
) -> bool:
    """Ends a request wherever it is, with `status` as its end; False when it had ended before.

    The lane's entry goes where a worker has it; one that waits is deleted by its claimer.
    Raises NotFound when nothing is known of the request, and Unavailable.
    """
    if await _has_ended(redis, request):
        return False
    (taken,) = await take(redis, [request], "")
    if taken is None:
        raise NotFound(
            f"no request {request.request_id!r} is known; it ended too long ago or never was",
            reason="REQUEST_NOT_FOUND",
        )
    if taken.terminal is not None:
        return False
    end = codec.encode(StreamEntry(terminal=Terminal(error=status)))
    (outcome,) = await append(redis, [Append(request, EntryId(taken.epoch, 1), end)])
    if outcome is Appended.VANISHED:
        return False
    if outcome is not Appended.WRITTEN:
        # Another owner came between fence and end: take it from them.
        return await cancel(redis, request, status, retention_ms=retention_ms)
    await tell_owner(redis, request, _cancel_notice(request))
    await _announce(redis, request, taken.watchers, retention_ms)
    await _leave_lane(redis, request)
    return True


@redis_errors
async def _has_ended(redis: Redis, request: RequestKeys) -> bool:
    last: Any = await redis.xrevrange(request.log, "+", "-", count=1)
    return bool(last) and codec.from_fields(StreamEntry, last[0][1]).HasField("terminal")


def _cancel_notice(request: RequestKeys) -> ControlEntry:
    return ControlEntry(cancel=CancelNotice(tenant=request.tenant, request_id=request.request_id))


@redis_errors
async def _announce(redis: Redis, request: RequestKeys, watchers: frozenset[str], retention_ms: int) -> None:
    pipe = redis.pipeline(transaction=False)
    dirty.push(pipe, {gateway_id: [dirty.unread(request)] for gateway_id in watchers})
    for key in request.living_with_log:
        pipe.pexpire(key, retention_ms)
    pipe.delete(request.attached)
    await pipe.execute()


@redis_errors
async def _leave_lane(redis: Redis, request: RequestKeys) -> None:
    """Takes the request's entry out of its lane if a worker has it.

    Its owner may have been refused a write before it could be told, and then holds an entry of which it
    knows no more.
    """
    lane, entry = await redis.hmget(request.reservation, ["lane", "entry"])
    if lane is None or entry is None:
        return
    try:
        held: Any = await redis.xpending_range(lane, keys.GROUP, entry, entry, 1)
    except ResponseError as error:
        if "NOGROUP" in str(error):
            return
        raise
    if held:
        pipe = redis.pipeline(transaction=False)
        lanes.finish(pipe, lane, entry)
        await pipe.execute()


@redis_errors
async def watch(
    redis: Redis, request: RequestKeys, gateway_id: str, *, attached_ms: int = keys.ATTACHED_MS
) -> None:
    """Puts this gateway among those that are told of the request's news, and says that its client is there.

    Read the log afterwards: what was written before is not announced.
    """
    pipe = redis.pipeline(transaction=False)
    pipe.sadd(request.watchers, gateway_id)
    pipe.pexpire(request.watchers, keys.ACTIVE_MS, nx=True)
    pipe.set(request.attached, gateway_id, px=attached_ms)
    await pipe.execute()
    notice = WatchNotice(tenant=request.tenant, request_id=request.request_id, gateway_id=gateway_id)
    await tell_owner(redis, request, ControlEntry(watch=notice))


@redis_errors
async def tell_owner(redis: Redis, request: RequestKeys, notice: ControlEntry) -> None:
    """Sends a notice to the worker that runs the request, if one does."""
    owner: Any = await redis.get(request.owner)
    if owner is None:
        return
    pipe = redis.pipeline(transaction=False)
    stream = keys.control(owner.decode())
    pipe.xadd(stream, codec.fields(notice), maxlen=keys.CONTROL_LIMIT, approximate=True)
    pipe.pexpire(stream, keys.LEASE_MS, nx=True)
    await pipe.execute()


@dataclass(frozen=True, slots=True)
class Notice:
    """An entry of a control stream."""

    id: str
    entry: ControlEntry

    @property
    def added_ms(self) -> int:
        """When it was added, milliseconds since 1970 on Redis's clock."""
        return int(self.id.partition("-")[0])


@redis_errors
async def read_notices(
    redis: Redis, consumer: str, after: str, *, block_ms: int
) -> tuple[str, Sequence[Notice]]:
    """A worker's notices after an id ("0": all), waiting up to `block_ms`; and the id to go on from.

    `redis` is a client for blocking reads.
    """
    reply: Any = await redis.xread({keys.control(consumer): after}, count=256, block=block_ms)
    entries = stream_entries(reply)
    if not entries:
        return after, []
    notices = [Notice(id_.decode(), codec.from_fields(ControlEntry, values)) for id_, values in entries]
    return notices[-1].id, notices


def stream_entries(reply: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """The entries of XREAD's or XREADGROUP's reply, whatever the protocol's shape; deleted ones left out."""
    found: list[tuple[bytes, dict[bytes, bytes]]] = []
    for _, entries in reply.items() if isinstance(reply, dict) else reply or ():
        for item in entries:
            found.extend(item if isinstance(item, list) else [item])
    return [(id_, values) for id_, values in found if values]

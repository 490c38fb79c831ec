"""Taking a request: a new epoch, a fence, then everything that was written before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from treadle.api.worker.v1.queue_pb2 import Fence, StreamEntry, Terminal
from treadle.errors import Unavailable
from treadle.queue import codec, keys
from treadle.queue.connection import redis_errors
from treadle.queue.keys import RequestKeys
from treadle.queue.log import EntryId, LogEntry, is_refused_id, log_entries, read_tops

_TRIES = 4


@dataclass(frozen=True, slots=True)
class Taken:
    """A request that the caller alone may now write to."""

    keys: RequestKeys
    epoch: int
    entries: list[LogEntry]
    """All that was written before, fences among it, this one's too."""
    watchers: frozenset[str]
    """The gateways to tell of news."""
    attached: bool
    """Whether a gateway says that the client is there."""

    @property
    def terminal(self) -> Terminal | None:
        """Its end, where it has ended."""
        for _, entry in reversed(self.entries):
            if entry.HasField("terminal"):
                return entry.terminal
        return None


async def take(redis: Redis, requests: Sequence[RequestKeys], consumer: str) -> list[Taken | None]:
    """Takes requests for `consumer` (empty: a gateway, which will not own them); None where the log is gone.

    Raises Unavailable where Redis is away, or others took a request each time this call tried.
    """
    taken: dict[RequestKeys, Taken | None] = {}
    rest = list(dict.fromkeys(requests))
    for _ in range(_TRIES):
        if not rest:
            return [taken[request] for request in requests]
        taken.update(await _try(redis, rest, consumer))
        rest = [request for request in rest if request not in taken]
        if rest:
            await _lift_counters(redis, rest)
    if rest:
        raise Unavailable("others took the request at the same moment", reason="CONTENDED", retry_after_s=0.1)
    return [taken[request] for request in requests]


@redis_errors
async def _try(
    redis: Redis, requests: Sequence[RequestKeys], consumer: str
) -> dict[RequestKeys, Taken | None]:
    pipe = redis.pipeline(transaction=False)
    for request in requests:
        pipe.incr(request.epoch)
    epochs: list[int] = await pipe.execute()
    fence = codec.fields(StreamEntry(fence=Fence(consumer=consumer)))
    pipe = redis.pipeline(transaction=False)
    for request, epoch in zip(requests, epochs, strict=True):
        pipe.xadd(request.log, fence, id=str(EntryId(epoch, 0)), nomkstream=True)
        pipe.xrange(request.log)
        # The owner before the watchers: a gateway adds itself, then reads the owner to tell it.
        if consumer:
            pipe.set(request.owner, consumer, px=keys.ACTIVE_MS)
        else:
            pipe.get(request.owner)
        pipe.smembers(request.watchers)
        pipe.exists(request.attached)
        pipe.pexpire(request.epoch, keys.ACTIVE_MS)
    replies: list[Any] = await pipe.execute(raise_on_error=False)
    width = len(replies) // len(requests)
    found: dict[RequestKeys, Taken | None] = {}
    for number, (request, epoch) in enumerate(zip(requests, epochs, strict=True)):
        fenced, entries, _, watchers, attached, _ = replies[number * width : (number + 1) * width]
        if fenced is None:
            found[request] = None
        elif isinstance(fenced, bytes):
            for reply in (entries, watchers, attached):
                if isinstance(reply, Exception):
                    raise reply
            names = frozenset(name.decode() for name in watchers)
            found[request] = Taken(request, epoch, log_entries(entries), names, bool(attached))
        elif not is_refused_id(fenced):
            raise fenced if isinstance(fenced, Exception) else ResponseError(str(fenced))
    return found


@redis_errors
async def _lift_counters(redis: Redis, requests: Sequence[RequestKeys]) -> None:
    """Brings counters that Redis lost back over their logs' tops; others get a number they skip."""
    tops = await read_tops(redis, requests)
    pipe = redis.pipeline(transaction=False)
    for request in requests:
        pipe.get(request.epoch)
    counters: list[Any] = await pipe.execute()
    pipe = redis.pipeline(transaction=False)
    for request, top, counter in zip(requests, tops, counters, strict=True):
        if top is not None and top.id.epoch > int(counter or 0):
            pipe.incrby(request.epoch, top.id.epoch - int(counter or 0))
    if len(pipe):
        await pipe.execute()

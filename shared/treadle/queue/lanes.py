"""The worker's side of the lanes: find them, take from them, take over, hand back, delete.

An entry stays in its lane, pending for its consumer, from its delivery to its request's end: what a dead
worker held is found there. Nobody may claim from a consumer that beats; NOBODY never does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import ResponseError

from treadle.queue import codec, keys
from treadle.queue.connection import redis_errors
from treadle.queue.keys import RequestKeys
from treadle.queue.workers import living

FORGET_CONSUMER_MS = 600_000
"""A dead consumer without entries is removed from a lane's group after so long: a paused worker that
wakes must not lose what it takes in that very moment."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A lane's entry, delivered to this consumer. Whether its data can be read is the caller's to judge."""

    lane: str
    entry_id: str
    data: bytes

    @property
    def added_ms(self) -> int:
        """When it was added, milliseconds since 1970 on Redis's clock."""
        return int(self.entry_id.partition("-")[0])


@redis_errors
async def find(redis: Redis, profile: str) -> list[str]:
    """The profile's lanes in the order in which workers claim: by priority, then by name."""
    members: Any = await redis.smembers(keys.lanes(profile))
    names = [name.decode() for name in members]
    return sorted(names, key=lambda name: (keys.PRIORITIES.index(keys.lane_priority(name)), name))


@redis_errors
async def take_new(redis: Redis, lane: str, consumer: str, count: int) -> list[Delivery]:
    """Up to `count` waiting entries of one lane, at once."""
    return await _read(redis, [lane], consumer, count, None)


@redis_errors
async def await_new(redis: Redis, lanes: Sequence[str], consumer: str, *, block_ms: int) -> list[Delivery]:
    """At most one waiting entry a lane, as soon as there is any; none after `block_ms`.

    `redis` is a client for blocking reads.
    """
    return await _read(redis, lanes, consumer, 1, block_ms)


async def _read(
    redis: Redis, lanes: Sequence[str], consumer: str, count: int, block_ms: int | None
) -> list[Delivery]:
    try:
        reply: Any = await redis.xreadgroup(
            keys.GROUP, consumer, dict.fromkeys(lanes, ">"), count=count, block=block_ms
        )
    except ResponseError as error:
        if "NOGROUP" not in str(error):
            raise
        # Redis lost a lane that the set still names, or its group.
        await _create_groups(redis, lanes)
        return []
    found = []
    for lane, entries in reply.items() if isinstance(reply, dict) else reply or ():
        for item in entries:
            for entry_id, values in item if isinstance(item, list) else [item]:
                found.append(_delivery(lane.decode(), entry_id, values))
    return found


def _delivery(lane: str, entry_id: bytes, values: dict[bytes, bytes] | None) -> Delivery:
    return Delivery(lane, entry_id.decode(), (values or {}).get(codec.FIELD, b""))


async def _create_groups(redis: Redis, lanes: Sequence[str]) -> None:
    pipe = redis.pipeline(transaction=False)
    for lane in lanes:
        pipe.xgroup_create(lane, keys.GROUP, id="0", mkstream=True)
    for reply in await pipe.execute(raise_on_error=False):
        if isinstance(reply, Exception) and "BUSYGROUP" not in str(reply):
            raise reply


@dataclass(frozen=True, slots=True)
class Backlog:
    """What nobody has claimed."""

    waiting: int
    """Entries that were never delivered."""
    oldest_ms: int
    """When the oldest of them was added, as `Delivery.added_ms`; 0 where none waits."""


@redis_errors
async def backlog(redis: Redis, lanes: Sequence[str]) -> Backlog:
    """The backlog of some lanes together."""
    pipe = redis.pipeline(transaction=False)
    for lane in lanes:
        pipe.xlen(lane)
        pipe.xinfo_groups(lane)
    replies: list[Any] = await pipe.execute(raise_on_error=False) if lanes else []
    waiting, last = 0, {}
    for lane, length, groups in zip(lanes, replies[::2], replies[1::2], strict=True):
        for group in groups if isinstance(groups, list) else ():
            # The group's own lag is unknown once an entry was deleted.
            if isinstance(length, int) and length > group["pending"]:
                waiting += length - group["pending"]
                last[lane] = group["last-delivered-id"].decode()
    pipe = redis.pipeline(transaction=False)
    for lane, entry_id in last.items():
        pipe.xrange(lane, f"({entry_id}", "+", count=1)
    found: list[Any] = await pipe.execute() if last else []
    ages = [int(entries[0][0].partition(b"-")[0]) for entries in found if entries]
    return Backlog(waiting if ages else 0, min(ages, default=0))


@redis_errors
async def length(redis: Redis, lanes: Sequence[str]) -> int:
    """Entries of some lanes together: requests that wait, and those that run on any worker."""
    pipe = redis.pipeline(transaction=False)
    for lane in lanes:
        pipe.xlen(lane)
    replies: list[int] = await pipe.execute() if lanes else []
    return sum(replies)


@redis_errors
async def orphaned(redis: Redis, lane: str, consumer: str) -> dict[str, int]:
    """The consumers of a lane that hold entries and do not beat, with how many; never this one."""
    consumers = await _consumers(redis, lane)
    holders = {name: pending for name, (pending, _) in consumers.items() if pending and name != consumer}
    alive = await living(redis, holders)
    return {name: pending for name, pending in holders.items() if name not in alive}


async def _consumers(redis: Redis, lane: str) -> dict[str, tuple[int, int]]:
    """Each consumer's pending entries and milliseconds since it was last heard of."""
    try:
        reply: Any = await redis.xinfo_consumers(lane, keys.GROUP)
    except ResponseError as error:
        if "NOGROUP" in str(error) or "no such key" in str(error):
            return {}
        raise
    return {row["name"].decode(): (row["pending"], row["idle"]) for row in reply}


@redis_errors
async def take_over(
    redis: Redis, lane: str, holder: str, consumer: str, count: int, *, lease_ms: int = keys.LEASE_MS
) -> list[Delivery]:
    """Up to `count` of a dead holder's entries, idle for `lease_ms`; of workers that try, one gets each."""
    pending: Any = await redis.xpending_range(
        lane, keys.GROUP, "-", "+", count, consumername=holder, idle=lease_ms
    )
    ids = [row["message_id"] for row in pending]
    if not ids:
        return []
    reply: Any = await redis.xclaim(lane, keys.GROUP, consumer, lease_ms, ids)
    return [_delivery(lane, entry_id, values) for entry_id, values in reply if entry_id is not None]


@redis_errors
async def take_stray(
    redis: Redis, lane: str, consumer: str, known: Collection[str], *, idle_ms: int
) -> list[Delivery]:
    """Entries that are this consumer's for `idle_ms` or longer without being `known` to it.

    So it gets those whose delivery it never saw (a connection broke), and those that it dropped because
    somebody else had taken their request.
    """
    pending: Any = await redis.xpending_range(
        lane, keys.GROUP, "-", "+", len(known) + 64, consumername=consumer, idle=idle_ms or None
    )
    ids = [row["message_id"] for row in pending if row["message_id"].decode() not in known]
    if not ids:
        return []
    reply: Any = await redis.xclaim(lane, keys.GROUP, consumer, idle_ms, ids)
    return [_delivery(lane, entry_id, values) for entry_id, values in reply if entry_id is not None]


@redis_errors
async def owners(redis: Redis, requests: Sequence[RequestKeys]) -> list[str | None]:
    """The living owner of each request; None where it has none, or one that is dead."""
    pipe = redis.pipeline(transaction=False)
    for request in requests:
        pipe.get(request.owner)
    values: list[Any] = await pipe.execute() if requests else []
    names = [None if value is None else value.decode() for value in values]
    alive = await living(redis, [name for name in names if name])
    return [name if name in alive else None for name in names]


@redis_errors
async def remove(redis: Redis, deliveries: Sequence[Delivery]) -> None:
    """Takes entries out of their lanes that need no worker: ended, gone, or there twice."""
    pipe = redis.pipeline(transaction=False)
    for delivery in deliveries:
        finish(pipe, delivery.lane, delivery.entry_id)
    if len(pipe):
        await pipe.execute()


@redis_errors
async def give(redis: Redis, owned: Mapping[Delivery, str]) -> None:
    """Gives entries to the consumers that own their requests: should one die, they are found among its."""
    pipe = redis.pipeline(transaction=False)
    for delivery, owner in owned.items():
        pipe.xclaim(delivery.lane, keys.GROUP, owner, 0, [delivery.entry_id], justid=True)
    if len(pipe):
        await pipe.execute()


@redis_errors
async def hand_back(redis: Redis, consumer: str, held: Iterable[tuple[RequestKeys, str, str]]) -> int:
    """Makes entries claimable at once, by anybody: (request, lane, entry id) of each; returns how many.

    What another worker has claimed meanwhile stays with it. The owner's key goes first: a claimer that
    finds a living owner takes an entry for a second one of the same request, and deletes it.
    """
    held = list(held)
    pipe = redis.pipeline(transaction=False)
    for _, lane, entry_id in held:
        pipe.xpending_range(lane, keys.GROUP, entry_id, entry_id, 1, consumername=consumer)
    still = await pipe.execute()
    pipe = redis.pipeline(transaction=False)
    for (request, lane, entry_id), pending in zip(held, still, strict=True):
        if pending:
            pipe.delete(request.owner)
            pipe.xclaim(
                lane, keys.GROUP, keys.NOBODY, 0, [entry_id], idle=keys.HANDED_BACK_IDLE_MS, justid=True
            )
    if len(pipe):
        await pipe.execute()
    return sum(map(bool, still))


def finish(pipe: Pipeline, lane: str | bytes, entry_id: str | bytes) -> None:
    """Adds to a pipeline what takes an entry out of its lane: only after its request's end was written."""
    pipe.xack(lane, keys.GROUP, entry_id)
    pipe.xdel(lane, entry_id)


@redis_errors
async def forget_dead(redis: Redis, lane: str) -> list[str]:
    """Removes consumers that died long ago and hold nothing; returns their names."""
    consumers = await _consumers(redis, lane)
    idle = [
        name
        for name, (pending, idle_ms) in consumers.items()
        if not pending and idle_ms >= FORGET_CONSUMER_MS and name != keys.NOBODY
    ]
    alive = await living(redis, idle)
    dead = [name for name in idle if name not in alive]
    for name in dead:
        await redis.xgroup_delconsumer(lane, keys.GROUP, name)
    return dead

"""Heartbeats: which workers live, and what they have ready."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from redis.asyncio import Redis

from treadle.api.worker.v1.queue_pb2 import WORKER_STATE_READY, Heartbeat
from treadle.queue import codec, keys
from treadle.queue.connection import redis_errors


@redis_errors
async def beat(redis: Redis, heartbeat: Heartbeat, *, lease_ms: int = keys.LEASE_MS) -> None:
    """Says that the worker lives, for `lease_ms`; RENEWALS times in it."""
    pipe = redis.pipeline(transaction=False)
    pipe.set(keys.beat(heartbeat.consumer), codec.encode(heartbeat), px=lease_ms)
    pipe.sadd(keys.WORKERS, heartbeat.consumer)
    pipe.pexpire(keys.control(heartbeat.consumer), lease_ms)
    await pipe.execute()


@redis_errors
async def leave(redis: Redis, consumer: str) -> None:
    """Takes the worker's beat and control stream away: whatever it held may be claimed."""
    pipe = redis.pipeline(transaction=False)
    pipe.delete(keys.beat(consumer), keys.control(consumer))
    pipe.srem(keys.WORKERS, consumer)
    await pipe.execute()


@redis_errors
async def heartbeats(redis: Redis) -> list[Heartbeat]:
    """Every living worker's heartbeat; the names of dead ones are removed on the way."""
    members: Any = await redis.smembers(keys.WORKERS)
    names = sorted(name.decode() for name in members)
    if not names:
        return []
    pipe = redis.pipeline(transaction=False)
    for name in names:
        pipe.get(keys.beat(name))
    values: list[Any] = await pipe.execute()
    gone = [name for name, value in zip(names, values, strict=True) if value is None]
    if gone:
        await redis.srem(keys.WORKERS, *gone)
    return [codec.decode(Heartbeat, value) for value in values if value is not None]


def ready_for(beats: Iterable[Heartbeat], profile: str) -> list[Heartbeat]:
    """The workers that have the profile ready."""
    return [
        heartbeat
        for heartbeat in beats
        if heartbeat.state == WORKER_STATE_READY
        and any(
            loaded.profile == profile and loaded.state == WORKER_STATE_READY for loaded in heartbeat.profiles
        )
    ]


@redis_errors
async def living(redis: Redis, consumers: Iterable[str]) -> set[str]:
    """Those of the consumers whose beat is there."""
    names = sorted(set(consumers))
    if not names:
        return set()
    pipe = redis.pipeline(transaction=False)
    for name in names:
        pipe.exists(keys.beat(name))
    replies: list[Any] = await pipe.execute()
    return {name for name, there in zip(names, replies, strict=True) if there}

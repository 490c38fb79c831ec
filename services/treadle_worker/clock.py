"""Redis's clock, as this host sees it: the host's own wall clock may lie."""

from __future__ import annotations

import time

from redis.asyncio import Redis

from treadle.queue.connection import redis_errors


class RedisClock:
    """Milliseconds since 1970 by Redis's clock, from the host's monotonic clock and an offset."""

    def __init__(self) -> None:
        self._offset_ms: float | None = None

    async def refresh(self, redis: Redis) -> None:
        """Asks Redis for its time; raises Unavailable."""
        before = time.monotonic()
        seconds, microseconds = await _time(redis)
        middle_ms = (before + time.monotonic()) / 2 * 1000
        self._offset_ms = seconds * 1000 + microseconds / 1000 - middle_ms

    def now_ms(self) -> float:
        """Redis's time; `refresh` must have succeeded once."""
        if self._offset_ms is None:
            raise RuntimeError("Redis's clock was never asked")
        return time.monotonic() * 1000 + self._offset_ms


@redis_errors
async def _time(redis: Redis) -> tuple[int, int]:
    seconds, microseconds = await redis.time()
    return int(seconds), int(microseconds)

"""Requests whose client went away, and the life of the keys of those that run long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis

from treadle.errors import Cancelled, TreadleError
from treadle.queue import keys
from treadle.queue.connection import redis_errors
from treadle_worker.requests import RequestTable, RunningRequest

logger = logging.getLogger(__name__)

RENEW_S = 60.0
"""How often the keys of what runs are given their full life again."""
_MISSES = 2
"""A gateway that was cut off from Redis for a moment gets a second chance."""


class Lapses:
    """Watches over one model's requests; `run` is a task."""

    def __init__(
        self,
        redis: Redis,
        table: RequestTable,
        end: Callable[[RunningRequest, TreadleError], None],
        *,
        look_s: float,
    ) -> None:
        """`look_s` lies between two looks."""
        self._redis = redis
        self._table = table
        self._end = end
        self._look_s = look_s

    async def run(self) -> None:
        """Looks for ever."""
        loop = asyncio.get_running_loop()
        renewed_at = loop.time()
        while True:
            await asyncio.sleep(self._look_s)
            try:
                await self._look()
                if loop.time() - renewed_at >= RENEW_S:
                    await self._renew()
                    renewed_at = loop.time()
            except TreadleError as error:
                logger.warning("could not see whose clients are there", extra={"reason": error.reason})

    async def _look(self) -> None:
        watched = [request for request in self._table if not request.job.detaches and not request.ended]
        for request, attached in zip(watched, await self._attached(watched), strict=True):
            request.misses = 0 if attached else request.misses + 1
            if request.misses >= _MISSES:
                self._end(request, Cancelled("the client went away", reason="CLIENT_GONE"))

    @redis_errors
    async def _attached(self, requests: list[RunningRequest]) -> list[bool]:
        if not requests:
            return []
        pipe = self._redis.pipeline(transaction=False)
        for request in requests:
            pipe.exists(request.keys.attached)
        replies: list[Any] = await pipe.execute()
        return [bool(reply) for reply in replies]

    @redis_errors
    async def _renew(self) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for request in self._table:
            for key in request.keys.living_with_log:
                pipe.pexpire(key, keys.ACTIVE_MS)
        if len(pipe):
            await pipe.execute()

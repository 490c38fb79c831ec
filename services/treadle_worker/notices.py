"""Reads the worker's control stream: cancellations and new watchers, for whichever model they concern."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from redis.asyncio import Redis

from treadle.errors import TreadleError
from treadle.queue.control import Notice, read_notices
from treadle.queue.keys import RequestKeys
from treadle_worker.clock import RedisClock
from treadle_worker.engine_run import EngineRun

logger = logging.getLogger(__name__)

BLOCK_MS = 1_000
_PAUSE_S = 0.5


class NoticeReader:
    """`run` is a task."""

    def __init__(
        self, blocking: Redis, consumer: str, clock: RedisClock, runs: Callable[[], Iterable[EngineRun]]
    ) -> None:
        self._blocking = blocking
        self._consumer = consumer
        self._clock = clock
        self._runs = runs

    async def run(self) -> None:
        """Reads for ever."""
        after = "0"
        while True:
            try:
                after, notices = await read_notices(self._blocking, self._consumer, after, block_ms=BLOCK_MS)
            except TreadleError as error:
                logger.warning("the control stream cannot be read", extra={"reason": error.reason})
                await asyncio.sleep(_PAUSE_S)
                continue
            for notice in notices:
                self._take(notice)

    def _take(self, notice: Notice) -> None:
        entry = notice.entry
        about = entry.cancel if entry.HasField("cancel") else entry.watch
        request_keys = RequestKeys(about.tenant, about.request_id)
        for run in self._runs():
            request = run.table.by_keys(request_keys)
            if request is None:
                continue
            if entry.HasField("cancel"):
                run.cancelled(request, (self._clock.now_ms() - notice.added_ms) / 1000)
            else:
                run.watch(request, entry.watch.gateway_id)

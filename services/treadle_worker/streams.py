"""Writes the token streams: one pipeline a round for all requests, one step behind the engine.

A round writes at most one entry a request, looks at each reply, and acknowledges the lane's entry of those
whose end is there in the next round. While Redis is away it tries the same entries again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from treadle.errors import TreadleError
from treadle.queue import dirty, keys, lanes
from treadle.queue.log import Append, Appended, EntryId, append
from treadle_worker.requests import RunningRequest

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class StreamWriter:
    """Owns what is yet to be written; `run` is a task.

    `let_go` is called once for each request that needs this worker no more: its end is written
    (WRITTEN), another owner has it (FENCED), a gateway ended it (CANCELLED), or its log is gone (VANISHED).
    """

    def __init__(self, redis: Redis, let_go: Callable[[RunningRequest, Appended], None]) -> None:
        self._redis = redis
        self._let_go = let_go
        self._marked: dict[RunningRequest, None] = {}
        self._announced: dict[RunningRequest, None] = {}
        self._finished: dict[RunningRequest, None] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.entries_written = 0
        """Entries whose reply was seen."""

    def mark(self, request: RunningRequest) -> None:
        """There may be something to write."""
        self._marked[request] = None
        self._news()

    def announce(self, request: RunningRequest) -> None:
        """Tells the request's gateways to read its log."""
        self._announced[request] = None
        self._news()

    def finish(self, request: RunningRequest) -> None:
        """Takes the entry of a request whose end is in its log out of its lane."""
        self.forget(request)
        self._finished[request] = None
        self._news()

    def forget(self, request: RunningRequest) -> None:
        """Writes no more for the request."""
        self._marked.pop(request, None)
        self._announced.pop(request, None)

    async def flushed(self) -> None:
        """Waits until everything is written and acknowledged."""
        await self._idle.wait()

    async def run(self) -> None:
        """Writes for ever."""
        pause_s = _FIRST_PAUSE_S
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                refused = await self._round()
            except TreadleError as error:
                logger.warning("writing failed, it is tried again", extra={"reason": error.reason})
                refused = True
            if refused:
                self._wake.set()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                pause_s = _FIRST_PAUSE_S
            if not (self._marked or self._announced or self._finished):
                self._idle.set()

    def _news(self) -> None:
        self._idle.clear()
        self._wake.set()

    async def _round(self) -> bool:
        """One pipeline; True where Redis refused something for now."""
        writing: list[tuple[RunningRequest, Append, bool]] = []
        for request in list(self._marked):
            outgoing = request.outgoing()
            if outgoing is None:
                del self._marked[request]
            else:
                entry_id = EntryId(request.epoch, outgoing.number)
                writing.append((request, Append(request.keys, entry_id, outgoing.data), outgoing.is_terminal))
        finished, announced = list(self._finished), list(self._announced)

        def also(pipe: Pipeline) -> None:
            _push_news(pipe, [*announced, *(request for request, _, _ in writing)])
            for request in finished:
                _acknowledge(pipe, request)

        outcomes = await append(self._redis, [entry for _, entry, _ in writing], also)
        for request in finished:
            self._finished.pop(request, None)
        for request in announced:
            self._announced.pop(request, None)
        refused = False
        for (request, _, is_terminal), outcome in zip(writing, outcomes, strict=True):
            if request not in self._marked:
                continue  # forgotten meanwhile
            if outcome is Appended.REFUSED:
                refused = True
            elif outcome is Appended.WRITTEN:
                self.entries_written += 1
                request.written()
                if is_terminal:
                    logger.info("ended a request", extra={"request_id": request.keys.request_id})
                    self.finish(request)
                    self._let_go(request, outcome)
            else:
                self.forget(request)
                self._let_go(request, outcome)
        if self._marked or self._finished or self._announced:
            self._wake.set()
        return refused


def _push_news(pipe: Pipeline, requests: list[RunningRequest]) -> None:
    news: dict[str, dict[str, None]] = {}
    for request in requests:
        for gateway_id in request.watchers:
            news.setdefault(gateway_id, {})[request.keys.tag] = None
    dirty.push(pipe, {gateway_id: list(tags) for gateway_id, tags in news.items()})


def _acknowledge(pipe: Pipeline, request: RunningRequest) -> None:
    lanes.finish(pipe, request.delivery.lane, request.delivery.entry_id)
    for key in request.keys.living_with_log:
        pipe.pexpire(key, request.job.retention_ms or keys.RETENTION_MS)
    pipe.delete(request.keys.attached)

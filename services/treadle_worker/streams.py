"""Writes the token streams: one pipeline a round for all requests, one step behind the engine.

A round writes at most one entry a request and looks at each reply; with the next round go the news of what
was written, and the acknowledgement of those whose end is there. Answers that flow are written in turns, at a
pace that depends on how many there are (`pace`). While Redis is away it tries the same entries again.
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
from treadle_worker.pace import Pace
from treadle_worker.requests import RunningRequest

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class StreamWriter:
    """Owns what is yet to be written; `run` is a task.

    `let_go` is called once for each request that needs this worker no more: its end is written
    (WRITTEN), another owner has it (FENCED), a gateway ended it (CANCELLED), or its log is gone (VANISHED).
    """

    def __init__(self, redis: Redis, let_go: Callable[[RunningRequest, Appended], None], pace: Pace) -> None:
        self._redis = redis
        self._let_go = let_go
        self._pace = pace
        self._marked: dict[RunningRequest, None] = {}
        self._finished: dict[RunningRequest, None] = {}
        self._news: dict[str, list[bytes]] = {}
        """To tell, by gateway."""
        self._wake = asyncio.Event()
        self._next_turn: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.entries_written = 0
        """Entries whose reply was seen."""

    def mark(self, request: RunningRequest) -> None:
        """There may be something to write."""
        self._marked[request] = None
        self._idle.clear()
        if self._next_turn is None or not request.may_gather:
            self._wake.set()  # else the next turn takes it along

    def announce(self, request: RunningRequest) -> None:
        """Tells the request's gateways to read its log."""
        self._tell(request, dirty.unread(request.keys))
        self._busy()

    def finish(self, request: RunningRequest) -> None:
        """Takes the entry of a request whose end is in its log out of its lane."""
        self.forget(request)
        self._finished[request] = None
        self._busy()

    def forget(self, request: RunningRequest) -> None:
        """Writes no more for the request."""
        self._marked.pop(request, None)

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
            if not (self._marked or self._news or self._finished):
                self._idle.set()

    def _busy(self) -> None:
        self._idle.clear()
        self._wake.set()

    def _tell(self, request: RunningRequest, item: bytes) -> None:
        for gateway_id in request.watchers:
            self._news.setdefault(gateway_id, []).append(item)

    def _due(self) -> list[RunningRequest]:
        """What is to be written now: everything at a turn, else what may not wait for it."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        urgent = [one for one in self._marked if not one.may_gather]
        if not (num_flowing := len(self._marked) - len(urgent)):
            return urgent
        wait_s = self._pace.wait_s(num_flowing, now)
        if not wait_s:
            self._pace.turned(now)
            return list(self._marked)
        if self._next_turn is None:
            self._next_turn = loop.call_later(wait_s, self._turn)
        return urgent

    def _turn(self) -> None:
        self._next_turn = None
        self._wake.set()

    async def _round(self) -> bool:
        """One pipeline; True where Redis refused something for now."""
        writing: list[tuple[RunningRequest, Append, bool]] = []
        for request in self._due():
            outgoing = request.outgoing()
            if outgoing is None:
                del self._marked[request]
            else:
                entry_id = EntryId(request.epoch, outgoing.number)
                writing.append((request, Append(request.keys, entry_id, outgoing.data), outgoing.is_terminal))
        finished = list(self._finished)
        news = {gateway_id: list(items) for gateway_id, items in self._news.items()}

        def also(pipe: Pipeline) -> None:
            dirty.push(pipe, news)
            for request in finished:
                _acknowledge(pipe, request)

        outcomes = await append(self._redis, [entry for _, entry, _ in writing], also)
        for request in finished:
            self._finished.pop(request, None)
        self._told(news)
        refused = False
        for (request, _, is_terminal), outcome in zip(writing, outcomes, strict=True):
            if request not in self._marked:
                continue  # forgotten meanwhile
            if outcome is Appended.REFUSED:
                refused = True
            elif outcome is Appended.WRITTEN:
                self._written(request, is_terminal)
            else:
                self.forget(request)
                self._let_go(request, outcome)
        if self._news or self._finished or not all(one.may_gather for one in self._marked):
            self._wake.set()
        return refused

    def _told(self, news: dict[str, list[bytes]]) -> None:
        """What was told is told; what came meanwhile is still to tell."""
        for gateway_id, items in news.items():
            del self._news[gateway_id][: len(items)]
            if not self._news[gateway_id]:
                del self._news[gateway_id]

    def _written(self, request: RunningRequest, is_terminal: bool) -> None:
        self.entries_written += 1
        self._tell(request, request.written())
        if is_terminal:
            logger.info("ended a request", extra={"request_id": request.keys.request_id})
            self.finish(request)
            self._let_go(request, Appended.WRITTEN)
        elif not request.has_more:
            self.forget(request)


def _acknowledge(pipe: Pipeline, request: RunningRequest) -> None:
    lanes.finish(pipe, request.delivery.lane, request.delivery.entry_id)
    for key in request.keys.living_with_log:
        pipe.pexpire(key, request.job.retention_ms or keys.RETENTION_MS)
    pipe.delete(request.keys.attached)

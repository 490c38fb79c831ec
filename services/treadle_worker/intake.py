"""Takes requests from the lanes as fast as the engine has room, and from the dead what they held."""

from __future__ import annotations

import asyncio
import logging
import math

from redis.asyncio import Redis

from treadle.errors import TreadleError
from treadle.queue import keys, lanes
from treadle.queue.lanes import Delivery
from treadle_worker.claims import Claimer
from treadle_worker.clock import RedisClock
from treadle_worker.engine_protocol import Ready
from treadle_worker.metrics import ModelMetrics
from treadle_worker.requests import RequestTable

logger = logging.getLogger(__name__)

BLOCK_MS = 250
"""How long a read waits; lanes that are new are seen after it."""
CHUNK = 4
"""Requests in one read: a burst is shared with the other workers that read meanwhile."""
MAX_TASKS = 256
"""Requests held at once for an engine that does not generate: enough short ones for several steps."""
TASK_SHARE = 8
"""One task counts as this part of the tokens held for such an engine at most, however many it has."""
SWEEP_S = 2.0
"""Between two looks for entries of the dead, for strays, and at the backlog."""
STRAY_MS = 5_000
"""An own entry that nobody here knows of is a stray after so long."""
_PAUSE_S = 0.5


class Capacity:
    """How many more requests the engine has room for: free sequences, and free blocks by estimate.

    An engine that does not generate keeps nothing of a request but its tokens, and computes as many of them a
    step as it likes: it is given so many tokens that a few steps are never short of them. The rest waits in
    the lanes, where any worker finds it. A large task counts as a part of them: the engine divides its steps
    fairly among tasks, but only among those that it was given.
    """

    def __init__(
        self, table: RequestTable, ready: Ready, *, max_claimed: int, max_claimed_tokens: int
    ) -> None:
        self._table = table
        self._ready = ready
        self._max_claimed_tokens = max_claimed_tokens
        self._limit = min(max_claimed, ready.max_num_seqs) if ready.generates else MAX_TASKS

    def free(self) -> int:
        """Requests that may be claimed now.

        What a request takes is known only when it has been claimed, so the mean of those held stands for
        the next one; an empty engine always has room for one.
        """
        held = len(self._table)
        slots = self._limit - held
        if slots <= 0 or not held:
            return max(0, slots)
        if self._ready.generates:
            room = self._ready.num_blocks
            # Of a task's texts an engine has some at a time.
            longest = self._ready.max_model_len
            held_tokens = [min(one.num_tokens, longest) for one in self._table]
            used = sum(math.ceil((tokens + 1) / self._ready.block_size) for tokens in held_tokens)
        else:
            room = self._max_claimed_tokens
            most = max(1, room // TASK_SHARE)
            used = max(1, sum(min(one.num_tokens, most) for one in self._table))
        return max(0, min(slots, (room - used) * held // used))


class Intake:
    """One profile's intake; `run` is a task."""

    def __init__(
        self,
        redis: Redis,
        blocking: Redis,
        *,
        profile: str,
        consumer: str,
        table: RequestTable,
        capacity: Capacity,
        claimer: Claimer,
        metrics: ModelMetrics,
        clock: RedisClock,
        lease_ms: int,
    ) -> None:
        self._redis = redis
        self._blocking = blocking
        self._profile = profile
        self._consumer = consumer
        self._table = table
        self._capacity = capacity
        self._claimer = claimer
        self._metrics = metrics
        self._clock = clock
        self._lease_ms = lease_ms
        self._room = asyncio.Event()
        self._paused = False
        self._swept_at = -math.inf
        self.num_taken_over = 0
        """Entries that were a dead consumer's, or handed back."""

    def has_room(self) -> None:
        """A request ended: there may be room again."""
        self._room.set()

    def pause(self) -> None:
        """Lets `run` end when what it has just been given is claimed."""
        self._paused = True
        self._room.set()

    async def run(self) -> None:
        """Claims until `pause`; waits out a Redis that is away."""
        while not self._paused:
            try:
                await self._turn()
            except TreadleError as error:
                logger.warning("claiming failed, it is tried again", extra={"reason": error.reason})
                await asyncio.sleep(_PAUSE_S)

    async def _turn(self) -> None:
        found = await lanes.find(self._redis, self._profile)
        loop = asyncio.get_running_loop()
        if loop.time() - self._swept_at >= SWEEP_S:
            await self._sweep(found)
            self._swept_at = loop.time()
        if await self._take_waiting(found):
            return
        free = self._capacity.free()
        if free and found:
            # Each lane may give one, so no more lanes are waited for than there is room.
            delivered = await lanes.await_new(self._blocking, found[:free], self._consumer, block_ms=BLOCK_MS)
            await self._claim(delivered)
        else:
            await self._wait_for_room()

    async def _take_waiting(self, found: list[str]) -> int:
        """Lane by lane, since a read's count is a stream's and not the call's."""
        taken = 0
        for lane in found:
            if free := self._capacity.free():
                delivered = await lanes.take_new(self._redis, lane, self._consumer, min(free, CHUNK))
                await self._claim(delivered)
                taken += len(delivered)
        return taken

    async def _wait_for_room(self) -> None:
        self._room.clear()
        try:
            async with asyncio.timeout(BLOCK_MS / 1000):
                await self._room.wait()
        except TimeoutError:
            return

    async def _claim(self, delivered: list[Delivery]) -> None:
        if delivered:
            await self._claimer.claim(delivered)

    async def _sweep(self, found: list[str]) -> None:
        """Strays first, then what the dead held, as far as there is room."""
        known = self._table.entry_ids | self._claimer.too_new
        for lane in found:
            mine = {entry_id for in_lane, entry_id in known if in_lane == lane}
            strays = await lanes.take_stray(self._redis, lane, self._consumer, mine, idle_ms=STRAY_MS)
            await self._claim(strays)
            for holder in await lanes.orphaned(self._redis, lane, self._consumer):
                if not (free := self._capacity.free()):
                    break
                orphans = await lanes.take_over(
                    self._redis, lane, holder, self._consumer, free, lease_ms=self._lease_ms
                )
                if orphans:
                    self.num_taken_over += len(orphans)
                    released = holder == keys.NOBODY
                    self._metrics.redelivered(len(orphans), handed_back=released)
                    logger.info(
                        "took requests over",
                        extra={"holder": holder, "count": len(orphans), "handed_back": released},
                    )
                await self._claim(orphans)
            await lanes.forget_dead(self._redis, lane)
        backlog = await lanes.backlog(self._redis, found)
        age_s = max(0.0, self._clock.now_ms() - backlog.oldest_ms) / 1000 if backlog.waiting else 0.0
        self._metrics.backlog(backlog.waiting, age_s)

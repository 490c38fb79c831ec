"""Says in Redis that this worker lives and what it has ready; with it goes its own readiness."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from redis.asyncio import Redis

from treadle.api.worker.v1.queue_pb2 import Heartbeat
from treadle.errors import TreadleError
from treadle.queue import keys, workers
from treadle_worker.clock import RedisClock

logger = logging.getLogger(__name__)

_RETRY_S = 0.5


class Heart:
    """`run` is a task; `wake` makes it beat at once."""

    def __init__(
        self,
        redis: Redis,
        clock: RedisClock,
        describe: Callable[[], Heartbeat],
        beaten: Callable[[bool], Awaitable[None]],
        *,
        lease_ms: int,
    ) -> None:
        """`beaten` is told after each try whether Redis took the beat, which holds for `lease_ms`."""
        self._redis = redis
        self._clock = clock
        self._describe = describe
        self._beaten = beaten
        self._lease_ms = lease_ms
        self._woken = asyncio.Event()
        self.num_beats = 0

    def wake(self) -> None:
        """What the beat says has changed."""
        self._woken.set()

    async def beat(self) -> bool:
        """Beats once; whether Redis took it."""
        self._woken.clear()
        try:
            await workers.beat(self._redis, self._describe(), lease_ms=self._lease_ms)
            await self._clock.refresh(self._redis)
        except TreadleError as error:
            logger.warning("the heartbeat failed", extra={"reason": error.reason})
            await self._beaten(False)
            return False
        self.num_beats += 1
        await self._beaten(True)
        return True

    async def first_beat(self) -> None:
        """Beats, and tries until Redis takes it."""
        while True:
            if await self.beat():
                return
            await asyncio.sleep(_RETRY_S)

    async def run(self) -> None:
        """Beats RENEWALS times a lease, for ever."""
        while True:
            pause_s = self._lease_ms / 1000 / keys.RENEWALS if await self.beat() else _RETRY_S
            try:
                async with asyncio.timeout(pause_s):
                    await self._woken.wait()
            except TimeoutError:
                continue

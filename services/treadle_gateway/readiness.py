"""Whether work should be sent to this gateway: asked of what it needs, again and again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from redis.asyncio import Redis

from treadle.errors import TreadleError
from treadle.queue.connection import redis_errors

logger = logging.getLogger(__name__)

Check = Callable[[], Awaitable[bool]]

NOT_READY_EVERY_S = 0.25
READY_EVERY_S = 1.0


class Readiness:
    """Ready when Redis, the registry and the tokenizer answer.

    The registry is needed once: what it said is remembered, so its absence later on takes no gateway away.
    """

    def __init__(self, redis: Check, registry: Check, tokenizer: Check) -> None:
        self._checks = {"redis": redis, "registry": registry, "tokenizer": tokenizer}
        self._has_been_ready = False
        self._missing: list[str] = []

    async def look(self) -> bool:
        """Asks all of them at once."""
        answers = await asyncio.gather(*(check() for check in self._checks.values()))
        missing = [name for name, there in zip(self._checks, answers, strict=True) if not there]
        if missing != self._missing:
            logger.info("what the gateway needs has changed", extra={"missing": missing})
        self._missing = missing
        ready = not missing or (self._has_been_ready and missing == ["registry"])
        self._has_been_ready = self._has_been_ready or ready
        return ready

    async def keep(self, set_ready: Callable[[bool], Awaitable[None]]) -> None:
        """Looks for ever, and says what it finds when that changes."""
        said: bool | None = None
        while True:
            ready = await self.look()
            if ready != said:
                await set_ready(ready)
                said = ready
            await asyncio.sleep(READY_EVERY_S if ready else NOT_READY_EVERY_S)


def redis_answers(redis: Redis) -> Check:
    """Whether Redis answers."""

    @redis_errors
    async def ping() -> bool:
        return bool(await redis.ping())

    async def check() -> bool:
        try:
            return await ping()
        except TreadleError:
            return False

    return check

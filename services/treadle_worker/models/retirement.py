"""How a model that is no longer wanted is let go, so that no request notices."""

from __future__ import annotations

import asyncio
import logging

from redis.asyncio import Redis

from treadle.errors import TreadleError
from treadle.queue import lanes, workers
from treadle_worker.models.model_host import ModelHost

logger = logging.getLogger(__name__)

SEEN_S = 2.0
"""Gateways hear of the change as late as this; until then the model is said to be ready."""
LINGER_S = 3.0
"""From the beat that says otherwise: gateways believe an older one for half a second, then a request has to
find its way into the lane."""
LOOK_EVERY_S = 0.25


async def retire(host: ModelHost, redis: Redis, consumer: str, *, timeout_s: float) -> None:
    """Returns when the host's engine may be stopped, `timeout_s` after its beginning at the latest.

    Requests are taken from the lanes until none can come any more: where another worker has the model ready,
    those that run are finished; where none has, everything that is in the lanes. What is left when the time
    is up goes back. May be cancelled as long as the host is not `draining`: then it goes on as before.
    """
    loop = asyncio.get_running_loop()
    ends = loop.time() + timeout_s
    try:
        async with asyncio.timeout_at(ends):
            await asyncio.sleep(SEEN_S)
            host.retire()
            await asyncio.sleep(LINGER_S)
            while True:
                if await _may_go(host, redis, consumer):
                    break
                await asyncio.sleep(LOOK_EVERY_S)
    except TimeoutError:
        logger.warning("the time to retire is up", extra={"model": host.name, "profile": host.profile})
    await host.drain(max(0.0, ends - loop.time()))


async def _may_go(host: ModelHost, redis: Redis, consumer: str) -> bool:
    try:
        if await another_ready(redis, host.profile, consumer):
            return True
        return not await lanes.length(redis, await lanes.find(redis, host.profile))
    except TreadleError as error:
        logger.warning("it is not known what waits for the model", extra={"reason": error.reason})
        return False


async def another_ready(redis: Redis, profile: str, consumer: str) -> bool:
    """Whether another worker says that it has the profile ready; raises Unavailable."""
    beats = await workers.heartbeats(redis)
    return any(beat.consumer != consumer for beat in workers.ready_for(beats, profile))

"""What happens to a request whose client goes away before its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from redis.asyncio import Redis

from treadle.errors import Cancelled, TreadleError
from treadle.queue import control
from treadle.queue.keys import RequestKeys
from treadle_gateway.convert import to_status
from treadle_gateway.lookup import other_watchers

logger = logging.getLogger(__name__)


def client_gone() -> Cancelled:
    """How a request ends whose client went away."""
    return Cancelled("the client went away; ask with DISCONNECT_MODE_DETACH to be able to come back")


async def abandon(
    redis: Redis,
    request: RequestKeys,
    gateway_id: str,
    submission: asyncio.Task[bool],
    followed: Callable[[], bool],
    error: TreadleError,
) -> None:
    """Ends a request with `error`, unless somebody else still waits for it.

    `submission` may still be under way, and nothing may be cancelled before it is known how it went: where
    it was refused, the id is another request's. `followed` says whether another client of this gateway waits.
    Where other gateways might have clients, the request is left to `attached`: it lapses when none has.
    """
    try:
        await asyncio.shield(submission)
    except TreadleError:
        return
    if followed() or await other_watchers(redis, request, gateway_id):
        return
    if await control.cancel(redis, request, to_status(error)):
        logger.info(
            "cancelled a request that nobody waits for",
            extra={"request_id": request.request_id, "reason": error.reason},
        )

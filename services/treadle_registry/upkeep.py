"""What the registry does by itself from time to time: leases end, uses are kept, the quota is held."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial

from treadle.errors import TreadleError
from treadle_registry.eviction import Eviction
from treadle_registry.registry import Registry

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.25
_AFTER_FAILURE_S = 5.0
_KEEP_USES_EVERY_S = 30.0


class Upkeep:
    """One task, between `start` and `close`."""

    def __init__(self, registry: Registry, eviction: Eviction) -> None:
        self._registry, self._eviction = registry, eviction
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins."""
        self._task = asyncio.create_task(self._run(), name="upkeep")

    async def close(self) -> None:
        """Ends it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        registry, eviction = self._registry, self._eviction
        keep_at, hold_at = time.monotonic() + _KEEP_USES_EVERY_S, time.monotonic() + eviction.unknown_s
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            # What has lapsed is refused whether it was swept up or not; the sweep tells who watches.
            if registry.rollouts.clock() >= registry.rollouts.book.next_deadline:
                await _tried(partial(registry.in_thread, registry.leasing.lapse))
            if time.monotonic() >= keep_at:
                keep_at = time.monotonic() + _KEEP_USES_EVERY_S
                await _tried(registry.keep_uses)
            if time.monotonic() >= hold_at:
                # What was over the quota when this registry started, or grew while leases were unknown.
                hold_at = math.inf
                await _tried(eviction.make_room)


async def _tried(work: Callable[[], Awaitable[None]]) -> None:
    """Logs what goes wrong, and waits a little: the next round tries again."""
    try:
        await work()
    except TreadleError as error:
        logger.error("upkeep failed", extra={"reason": error.reason, "cause": error.message})
        await asyncio.sleep(_AFTER_FAILURE_S)
    except Exception:
        logger.exception("upkeep failed")
        await asyncio.sleep(_AFTER_FAILURE_S)

"""Those who want the same thing at once wait for one getting of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Runs at most one call a key at a time. One event loop owns it."""

    def __init__(self) -> None:
        self._running: dict[K, asyncio.Task[V]] = {}
        self.num_started = 0
        """Calls that were begun."""

    async def run(self, key: K, call: Callable[[], Awaitable[V]]) -> V:
        """What `call` gives or raises, or what the call does that runs for `key` already.

        A caller that is cancelled leaves the call to the others.
        """
        task = self._running.get(key)
        if task is None:
            self.num_started += 1
            task = self._running[key] = asyncio.create_task(self._call(key, call))
            task.add_done_callback(_look_at_error)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Calls off what still runs."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _call(self, key: K, call: Callable[[], Awaitable[V]]) -> V:
        try:
            return await call()
        finally:
            del self._running[key]


def _look_at_error(task: asyncio.Task[V]) -> None:
    """Keeps asyncio from complaining of an error that every caller left before it came."""
    if not task.cancelled():
        task.exception()
